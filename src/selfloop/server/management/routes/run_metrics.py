"""The curves of a run, and the same as they come."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from selfloop.control.observe.run_metrics import Curves, Fresh
from selfloop.server.management.schemas.run_metrics import (
    MAX_LIMIT,
    MAX_NAMES,
    MAX_POINTS,
    MAX_STREAM_S,
    Names,
    PointV1,
    RunMetricsV1,
)
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.connection import EventStream, while_connected
from selfloop.server.shared.events import frame
from selfloop.types.errors import BadRequest, SelfloopError

router = APIRouter()

# A comment: it says that the connection lives.
_QUIET = b": quiet\n\n"

After = Annotated[int, Query(ge=0, le=2**53, description="Only what was measured behind this number.")]


@router.get("/loops/runs/{run_id}/metrics", summary="What a run's operations measured.", response_model=RunMetricsV1)
async def run_metrics(
    run_id: str,
    caller: CallerOf,
    control: ControlOf,
    names: Annotated[Names | None, Query(description="Comma-separated; all of them without it.")] = None,
    after: After = 0,
    limit: Annotated[
        int | None,
        Query(ge=1, le=MAX_LIMIT, description="So many measurements at most. 1000, and all of them with `points`."),
    ] = None,
    points: Annotated[
        int | None,
        Query(ge=3, le=MAX_POINTS, description="Each series by so many points at most, with its peaks."),
    ] = None,
) -> Response:
    """Losses by forward and forward_backward; norms, rates by optim_step; tokens, waits and seconds of each.

    Kept for as long as the run. With `points` each series is thinned out by largest triangles (three buckets).
    """
    curves = await control.run_metrics.curves(
        caller,
        run_id,
        names=None if names is None else _split(names),
        after=after,
        limit=1000 if limit is None and points is None else limit,
        num_points=points,
    )
    # Beside the event loop: there may be tens of thousands of numbers.
    return Response(await asyncio.to_thread(_encoded, run_id, curves), media_type="application/json")


@router.get(
    "/loops/runs/{run_id}/metrics/stream",
    summary="What a run's operations measure, as it comes.",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": PointV1.model_json_schema()}}}},
)
async def follow_run_metrics(
    run_id: str,
    request: Request,
    caller: CallerOf,
    control: ControlOf,
    after: After = 0,
    timeout: Annotated[
        float, Query(ge=0, le=MAX_STREAM_S, description="Seconds after which the stream ends; ask again for more.")
    ] = MAX_STREAM_S,
) -> Response:
    """Server-sent events: `metrics` for each measurement, and `end` once the run has ended."""
    source = control.run_metrics.follow(caller, run_id, after, timeout)

    async def first() -> Fresh:
        return await anext(source)

    async def frames() -> AsyncGenerator[bytes]:
        fresh: Fresh | None = head
        try:
            while fresh is not None:
                yield b"".join(frame(point, "metrics") for point in fresh.points) or _QUIET
                if fresh.is_last:
                    yield frame({"run_id": run_id}, "end")
                fresh = await anext(source, None)
        except SelfloopError as error:
            yield frame({"message": str(error)}, "error")

    head = await while_connected(request, first())
    return EventStream(frames(), source, {})


def _split(names: str) -> set[str]:
    asked = names.split(",")
    if len(asked) > MAX_NAMES or not all(asked):
        raise BadRequest("names", f"1 to {MAX_NAMES} names with commas between them, such as train/loss_mean")
    return set(asked)


def _encoded(run_id: str, curves: Curves) -> bytes:
    shown = {"run_id": run_id, "series": curves.series, "last": curves.last, "next_after": curves.next_after}
    return msgspec.json.encode(shown)
