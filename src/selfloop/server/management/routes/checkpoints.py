"""Checkpoints and their files."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from selfloop.control.resources.samplers import exactly_one
from selfloop.server.auth import CallerOf, ControlOf
from selfloop.server.management import schemas as s
from selfloop.server.management.access import RenderOf

router = APIRouter()


@router.get("/loops/checkpoints", summary="List checkpoints of a run, of a base model, or at a path.")
async def list_checkpoints(
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    run_id: str | None = None,
    base_model: str | None = None,
    checkpoint_path: str | None = None,
) -> s.ListLoopsCheckpointsResponseV1:
    exactly_one(run_id=run_id, base_model=base_model, checkpoint_path=checkpoint_path)
    if run_id is not None:
        rows = await control.checkpoints.of_run(caller, run_id)
    elif base_model is not None:
        rows = await control.checkpoints.of_model(caller, base_model)
    else:
        assert checkpoint_path is not None
        rows = [await control.checkpoints.at_path(caller, checkpoint_path, "checkpoint_path")]
    return s.ListLoopsCheckpointsResponseV1(checkpoints=[render.checkpoint(row) for row in rows])


@router.post("/loops/checkpoints/validate", summary="Check that a checkpoint can be used.")
async def validate_checkpoint(
    body: s.ValidateLoopsCheckpointRequestV1, caller: CallerOf, control: ControlOf
) -> dict[str, str]:
    row = await control.checkpoints.at_path(caller, body.checkpoint_path, "checkpoint_path")
    if body.run_id is not None:
        run = (await control.runs.get(caller, body.run_id)).run
        await control.catalogue.same_model(row.base_model, run.base_model, "checkpoint_path")
    return {}


@router.get("/loops/checkpoints/{checkpoint_id}/files", summary="List a checkpoint's files with links.")
async def checkpoint_files(
    checkpoint_id: str,
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    page_size: Annotated[int, Query(ge=1, le=1000)] = 1000,
    page_token: Annotated[int, Query(ge=0)] = 0,
) -> s.CheckpointFilesResponseV1:
    """The links work without a key for an hour."""
    files = await control.checkpoints.files(caller, checkpoint_id)
    end = page_token + page_size
    return s.CheckpointFilesResponseV1(
        presigned_urls=[render.file(checkpoint_id, f.name, f.size_bytes, f.modified_at) for f in files[page_token:end]],
        next_page_token=end if end < len(files) else None,
        total_count=len(files),
    )


@router.get("/loops/checkpoints/{checkpoint_id}/source", summary="Where a checkpoint's files come from.")
async def checkpoint_source(checkpoint_id: str, caller: CallerOf, control: ControlOf) -> s.CheckpointSourceResponseV1:
    await control.checkpoints.get(caller, checkpoint_id)
    return s.CheckpointSourceResponseV1()


public = APIRouter(tags=["management"])
"""Routes that need no key: the links of the files route."""


@public.get("/files/{checkpoint_id}/{name:path}", summary="Download a file by its link; Range is served.")
async def file(checkpoint_id: str, name: str, control: ControlOf, expires: int, signature: str) -> FileResponse:
    return FileResponse(control.checkpoints.open_link(checkpoint_id, name, expires, signature))
