"""What a run waited for and computed, over time."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Response

from selfloop.server.management.schemas.timelines import MAX_SPANS, RunTimelineV1
from selfloop.server.shared.auth import CallerOf, ControlOf

router = APIRouter()


@router.get("/loops/runs/{run_id}/timeline", summary="Waits and computing of a run.", response_model=RunTimelineV1)
async def run_timeline(
    run_id: str,
    caller: CallerOf,
    control: ControlOf,
    limit: Annotated[int, Query(ge=1, le=MAX_SPANS, description="So many of the newest at most.")] = 500,
) -> Response:
    """Operations of the run and samples of its weights, as far back as the log goes."""
    found = await control.traces.of_run(caller, run_id, limit)
    body = msgspec.json.encode({"run_id": run_id, "spans": found.spans, "is_whole": found.is_whole})
    return Response(body, media_type="application/json")


@router.get(
    "/loops/runs/{run_id}/timeline/perfetto",
    summary="The same as a file for Perfetto.",
    response_class=Response,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def run_timeline_file(run_id: str, caller: CallerOf, control: ControlOf) -> Response:
    """In Chrome's trace event format, with everything else that was logged about the run."""
    body = await control.traces.file_of_run(caller, run_id)
    return Response(
        body, media_type="application/json", headers={"content-disposition": f'attachment; filename="{run_id}.json"'}
    )
