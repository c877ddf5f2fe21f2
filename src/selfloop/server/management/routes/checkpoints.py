"""Checkpoints and their files."""

from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints.cleanup import CheckpointFilter
from selfloop.control.resources.deployments import DeployRequest
from selfloop.control.resources.listings import Cut, Part, Place, part_of
from selfloop.control.resources.samplers import exactly_one
from selfloop.server.management.render import RenderOf, Scope
from selfloop.server.management.schemas.checkpoints import (
    DeleteLoopsCheckpointsRequestV1,
    DeleteLoopsCheckpointsResponseV1,
    DeployLoopsCheckpointRequestV1,
    DeployLoopsCheckpointResponseV1,
    KeptCheckpointV1,
    ListLoopsCheckpointsResponseV1,
    LoopsCheckpointFilesResponseV1,
    LoopsCheckpointSourceResponseV1,
    LoopsCheckpointV1,
    ValidateLoopsCheckpointRequestV1,
    ValidateLoopsCheckpointResponseV1,
)
from selfloop.server.shared import tinker_paths
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed
from selfloop.types.ids import is_id
from selfloop.types.resources import Checkpoint
from selfloop.types.status import CheckpointTarget

router = APIRouter()


@router.get(
    "/loops/checkpoints",
    summary="List checkpoints of a run, of a base model, or at a path.",
    response_model=ListLoopsCheckpointsResponseV1,
)
async def list_checkpoints(
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    paging: PagingOf,
    run_id: str | None = None,
    base_model: str | None = None,
    checkpoint_path: str | None = None,
    scope: Scope = None,
) -> Response:
    """Newest first. By base model those of the caller's own runs, with `scope=org` of the whole team's.

    `checkpoint_path` is a `bt://` or `tinker://` path, or an id.
    """
    exactly_one(run_id=run_id, base_model=base_model, checkpoint_path=checkpoint_path)

    async def fetch(cut: Cut) -> Part[Checkpoint]:
        if run_id is not None:
            return await control.checkpoints.of_run(caller, run_id, cut)
        if base_model is not None:
            return await control.checkpoints.of_model(caller, base_model, cut, whole_team=scope == "org")
        assert checkpoint_path is not None
        row = await _named(checkpoint_path, caller, control)
        return part_of([row], lambda row: Place(row.created_at, row.id), cut)

    about = (caller.key_id, run_id, base_model, checkpoint_path, scope)
    return await listed(paging, "checkpoints", about, fetch, render.checkpoint)


async def _named(name: str, caller: Caller, control: Control) -> Checkpoint:
    """The checkpoint that a caller names as any client prints it."""
    if is_id(name):
        return await control.checkpoints.get(caller, name)
    path = tinker_paths.our_path(name, "checkpoint_path") if tinker_paths.is_path(name) else name
    return await control.checkpoints.at_path(caller, path, "checkpoint_path")


@router.post("/loops/checkpoints/validate", summary="Check that a checkpoint can be used.")
async def validate_checkpoint(
    body: ValidateLoopsCheckpointRequestV1, caller: CallerOf, control: ControlOf
) -> ValidateLoopsCheckpointResponseV1:
    """By itself, or for the sampler of a run, whose base model and adapted parts it must share."""
    run = None if body.run_id is None else (await control.runs.get(caller, body.run_id)).run
    await control.checkpoints.validate(caller, body.checkpoint_path, run)
    return ValidateLoopsCheckpointResponseV1()


@router.post("/loops/checkpoints/deploy", summary="Serve sampler checkpoints under a name, until deactivated.")
async def deploy_checkpoints(
    body: DeployLoopsCheckpointRequestV1, caller: CallerOf, control: ControlOf
) -> DeployLoopsCheckpointResponseV1:
    """A standing sampler with its own files of the checkpoints; a known name gets a further version."""
    request = DeployRequest(
        body.checkpoint_ids,
        model_name=body.model_name,
        instance_type_id=body.instance_type_id,
        hf_secret_name=body.hf_secret_name,
    )
    row = await control.deploys.deploy(caller, request)
    return DeployLoopsCheckpointResponseV1(model_id=row.model_id, deployment_id=row.deployment_id)


@router.post("/loops/checkpoints/delete", summary="Delete the checkpoints that match a filter; a dry run first.")
async def delete_checkpoints(
    body: DeleteLoopsCheckpointsRequestV1, caller: CallerOf, control: ControlOf, render: RenderOf
) -> DeleteLoopsCheckpointsResponseV1:
    """What a live sampler serves or a queued operation will load stays, and is reported with the reason."""
    chosen = CheckpointFilter(
        run_id=body.run_id,
        base_model=body.base_model,
        target=None if body.target is None else CheckpointTarget(body.target),
        name=body.name,
        older_than_s=body.older_than_seconds,
        keep_last=body.keep_last,
        whole_team=body.scope == "org",
    )
    cleaned = await control.cleanup.delete_matching(caller, chosen, dry_run=body.dry_run)
    return DeleteLoopsCheckpointsResponseV1(
        dry_run=body.dry_run,
        deleted=[render.checkpoint(row) for row in cleaned.deleted],
        kept=[KeptCheckpointV1(checkpoint=render.checkpoint(k.checkpoint), reason=k.reason) for k in cleaned.kept],
        size_bytes=sum(row.size_bytes for row in cleaned.deleted),
    )


@router.delete("/loops/checkpoints/{checkpoint_id}", summary="Delete a checkpoint that nothing needs.")
async def delete_checkpoint(
    checkpoint_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> LoopsCheckpointV1:
    return render.checkpoint(await control.cleanup.delete_one(caller, checkpoint_id))


@router.get("/loops/checkpoints/{checkpoint_id}/files", summary="List a checkpoint's files with links.")
async def checkpoint_files(
    checkpoint_id: str,
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    page_size: Annotated[int, Query(ge=1, le=1000)] = 1000,
    page_token: Annotated[int, Query(ge=0)] = 0,
) -> LoopsCheckpointFilesResponseV1:
    """The links work without a key for an hour."""
    files = await control.checkpoints.files(caller, checkpoint_id)
    end = page_token + page_size
    return LoopsCheckpointFilesResponseV1(
        presigned_urls=[render.file(checkpoint_id, f.name, f.size_bytes, f.modified_at) for f in files[page_token:end]],
        next_page_token=end if end < len(files) else None,
        total_count=len(files),
    )


@router.get("/loops/checkpoints/{checkpoint_id}/source", summary="Where a checkpoint's files come from.")
async def checkpoint_source(
    checkpoint_id: str, caller: CallerOf, control: ControlOf
) -> LoopsCheckpointSourceResponseV1:
    await control.checkpoints.get(caller, checkpoint_id)
    return LoopsCheckpointSourceResponseV1()


public = APIRouter(tags=["management"])
"""Routes that need no key: the links of the files route."""


@public.get("/files/{checkpoint_id}/{name:path}", summary="Download a file by its link; Range is served.")
async def file(checkpoint_id: str, name: str, control: ControlOf, expires: int, signature: str) -> FileResponse:
    return FileResponse(await control.checkpoints.open_signed_url(checkpoint_id, name, expires, signature))
