"""What happened: logs, metrics and debug archives of deployments, and usage."""

import asyncio
import time
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from selfloop.control.capacity.hardware import NODE
from selfloop.control.observe.meter import Minute, Step
from selfloop.control.observe.observations import LogWindow
from selfloop.control.observe.usage import UsageLine
from selfloop.control.resources.listings import Cut, Part, Place, part_of_sorted
from selfloop.server.management.render import Scope
from selfloop.server.management.schemas.common import iso
from selfloop.server.management.schemas.observations import (
    GetDeploymentLogsRequestV1,
    GetLogsResponseV1,
    GetLoopsDeploymentMetricsRequestV1,
    GetLoopsDeploymentMetricsResponseV1,
    InferenceVolumeByStatusDatapointV1,
    Level,
    LogsQueryV1,
    LogV1,
    LoopsDebugArchiveFilesResponseV1,
    LoopsDebugArchiveFileV1,
    LoopsDeploymentMetricsV1,
    LoopsDeploymentNodeMetricsV1,
    LoopsUsageResponseV1,
    LoopsUsageV1,
    MetricV1,
    NodeMetricsV1,
    ResponseTimeDatapointV1,
    StorageMetricsV1,
)
from selfloop.server.shared.auth import CallerOf, ControlOf, public_base
from selfloop.server.shared.lists import PagingOf, listed
from selfloop.types.errors import BadRequest
from selfloop.types.logline import LogLine

router = APIRouter()
public = APIRouter(tags=["management"])
"""Routes that need no key: the links of an archive."""

_MINUTE_MS = 60_000
_WEEK_MS = 7 * 86_400_000
_MAX_POINTS = 120
_LEVELS: dict[str, Level] = {"DEBUG": "DEBUG", "INFO": "INFO", "WARNING": "WARNING", "ERROR": "ERROR"}


@router.get("/loops/deployments/{deployment_id}/logs", summary="Log lines of a trainer deployment.")
async def deployment_logs(
    deployment_id: str, caller: CallerOf, control: ControlOf, query: Annotated[LogsQueryV1, Query()]
) -> GetLogsResponseV1:
    """Of the deployment, its runs and its worker; the newest first."""
    return _rendered(await control.observations.deployment_logs(caller, deployment_id, _window(query)))


@router.get("/models/{model_id}/deployments/{deployment_id}/logs", summary="Log lines of a sampler.")
async def get_sampler_logs(
    model_id: str,
    deployment_id: str,
    caller: CallerOf,
    control: ControlOf,
    query: Annotated[GetDeploymentLogsRequestV1, Query()],
) -> GetLogsResponseV1:
    """Of the samplers of an inference deployment and their worker; the newest first."""
    return await _sampler_logs(model_id, deployment_id, caller, control, query)


@router.post("/models/{model_id}/deployments/{deployment_id}/logs", summary="Log lines of a sampler, by a body.")
async def post_sampler_logs(
    model_id: str, deployment_id: str, caller: CallerOf, control: ControlOf, body: GetDeploymentLogsRequestV1
) -> GetLogsResponseV1:
    """As the GET of the same name."""
    return await _sampler_logs(model_id, deployment_id, caller, control, body)


@router.post("/loops/deployments/{deployment_id}/metrics", summary="Metrics of a trainer deployment.")
async def deployment_metrics(
    deployment_id: str, caller: CallerOf, control: ControlOf, body: GetLoopsDeploymentMetricsRequestV1
) -> GetLoopsDeploymentMetricsResponseV1:
    """Requests of its runs and paired samplers, and what its worker takes; steps without any are left out."""
    start_ms, end_ms = _bounds(body.start_epoch_millis, body.end_epoch_millis, 60 * _MINUTE_MS)
    step_s = body.step_seconds or max(-(-(end_ms - start_ms) // (_MAX_POINTS * _MINUTE_MS)), 1) * 60
    steps = await control.observations.metrics(caller, deployment_id, start_ms / 1000, end_ms / 1000, step_s)
    return GetLoopsDeploymentMetricsResponseV1(
        deployment_id=deployment_id, metrics=_metrics(steps, body.time_divisor_seconds or 1)
    )


@router.get("/loops/deployments/{deployment_id}/debug_archive/files", summary="Files for whoever helps, with links.")
async def debug_archive_files(
    deployment_id: str,
    request: Request,
    caller: CallerOf,
    control: ControlOf,
    page_size: Annotated[int, Query(ge=1, le=1000)] = 1000,
    page_token: str | None = None,
) -> LoopsDebugArchiveFilesResponseV1:
    """Made anew for each first page: log lines, the worker's output, statuses, versions, the machine."""
    archive_id, _, offset_text = (page_token or "").partition(":")
    if page_token is not None and not (archive_id and offset_text.isdecimal() and len(offset_text) <= 9):
        raise BadRequest("page_token", "the next_page_token of an earlier answer")
    offset = int(offset_text or 0)
    archive_id, files = await control.observations.archive(caller, deployment_id, archive_id or None)
    base, end = public_base(request), offset + page_size
    return LoopsDebugArchiveFilesResponseV1(
        presigned_urls=[
            LoopsDebugArchiveFileV1(
                url=f"{base}/debug_archives/{f.archive_id}/{f.name}?expires={f.expires}&signature={f.signature}",
                relative_file_name=f.name,
                size_bytes=f.size_bytes,
                last_modified=iso(f.modified_at),
            )
            for f in files[offset:end]
        ],
        next_page_token=f"{archive_id}:{end}" if end < len(files) else None,
    )


@public.get("/debug_archives/{archive_id}/{name}", summary="Download a file of a debug archive by its link.")
async def debug_archive_file(
    archive_id: str, name: str, control: ControlOf, expires: int, signature: str
) -> FileResponse:
    return FileResponse(control.observations.open_archive_signed_url(archive_id, name, expires, signature))


@router.get(
    "/loops/usage",
    summary="Tokens, compute seconds and bytes by run, key or team.",
    response_model=LoopsUsageResponseV1,
)
async def usage(
    caller: CallerOf,
    control: ControlOf,
    paging: PagingOf,
    run_id: str | None = None,
    scope: Scope = None,
    group_by: Literal["run", "key", "team"] = "run",
    start: Annotated[datetime | None, Query(description="From the hour that this lies in.")] = None,
    end: Annotated[datetime | None, Query(description="Hours that begin before this.")] = None,
) -> Response:
    """Of the caller's key, with `scope=org` of the team, the most computing first; kept by the hour."""
    start_s, end_s = _seconds("start", start), _seconds("end", end)
    if start_s is not None and end_s is not None and start_s > end_s:
        raise BadRequest("start", "a time before end")
    if run_id is not None:
        await control.runs.get(caller, run_id)
    lines = await control.observations.usage.report(
        caller, group_by, run_id=run_id, whole_team=scope == "org", start=start_s, end=end_s
    )

    async def fetch(cut: Cut) -> Part[UsageLine]:
        # There may be many lines at hand already: each slice takes a turn of its own.
        await asyncio.sleep(0)
        return part_of_sorted(lines, lambda line: Place(line.counts.compute_s, line.id), cut)

    about = (caller.key_id, run_id, scope, group_by, start, end)
    return await listed(paging, "usage", about, fetch, _usage_line, beside={"group_by": group_by})


def _usage_line(line: UsageLine) -> LoopsUsageV1:
    return LoopsUsageV1(
        id=line.id or None,
        name=line.label,
        operations=line.counts.operations,
        samples=line.counts.samples,
        tokens_trained=line.counts.tokens_trained,
        tokens_forwarded=line.counts.tokens_forwarded,
        tokens_prefilled=line.counts.tokens_prefilled,
        tokens_sampled=line.counts.tokens_sampled,
        compute_seconds=line.counts.compute_s,
        checkpoint_bytes=line.checkpoint_bytes,
    )


def _seconds(field: str, at: datetime | None) -> float | None:
    if at is None:
        return None
    if at.tzinfo is None:
        raise BadRequest(field, "an ISO 8601 time with its zone, e.g. 2026-01-31T12:00:00Z")
    return at.timestamp()


async def _sampler_logs(
    model_id: str, deployment_id: str, caller: CallerOf, control: ControlOf, asked: GetDeploymentLogsRequestV1
) -> GetLogsResponseV1:
    if asked.component is not None:
        raise BadRequest("component", "null: log lines here have no component")
    if asked.search_pattern is not None:
        raise BadRequest("search_pattern", "null: use includes and excludes, which match substrings")
    window = _window(asked, asked.request_id, asked.includes, asked.excludes)
    lines = await control.observations.sampler_logs(caller, model_id, deployment_id, window)
    return _rendered(lines if asked.replica in (None, NODE) else [])


def _window(
    query: LogsQueryV1,
    request_id: str | None = None,
    includes: list[str] | None = None,
    excludes: list[str] | None = None,
) -> LogWindow:
    start_ms, end_ms = _bounds(query.start_epoch_millis, query.end_epoch_millis, 30 * _MINUTE_MS)
    return LogWindow(
        start_ms,
        end_ms,
        newest_first=query.direction != "asc",
        limit=500 if query.limit is None else query.limit,
        min_level=query.min_level,
        request_id=request_id,
        includes=tuple(includes or ()),
        excludes=tuple(excludes or ()),
    )


def _bounds(start_ms: int | None, end_ms: int | None, default_ms: int) -> tuple[int, int]:
    end_ms = int(time.time() * 1000) if end_ms is None else end_ms
    start_ms = max(end_ms - default_ms, 0) if start_ms is None else start_ms
    if start_ms > end_ms:
        raise BadRequest("start_epoch_millis", f"a time before end_epoch_millis ({end_ms}), got {start_ms}")
    if end_ms - start_ms > _WEEK_MS:
        raise BadRequest("start_epoch_millis", "at most 7 days before end_epoch_millis")
    return start_ms, end_ms


def _rendered(lines: list[LogLine]) -> GetLogsResponseV1:
    return GetLogsResponseV1(
        logs=[
            LogV1(
                timestamp=str(line.at_ns),
                message=line.text,
                replica=NODE,
                request_id=line.operation_id or None,
                level=_LEVELS.get(line.level),
            )
            for line in lines
        ]
    )


def _metrics(steps: list[Step], divisor_s: int) -> LoopsDeploymentMetricsV1:
    machine = _machine([step for step in steps if step.sums.num_looks])
    return LoopsDeploymentMetricsV1(
        inference_volume=[_point(step, sum(step.sums.statuses.values()) * divisor_s / step.seconds) for step in steps],
        concurrent_requests=[
            _point(step, step.sums.request_s / step.sums.observed_s) for step in steps if step.sums.observed_s
        ],
        response_time_stats=[
            ResponseTimeDatapointV1(
                timestamp=iso(step.start),
                p50=step.sums.percentile_ms(0.5),
                p95=step.sums.percentile_ms(0.95),
                p99=step.sums.percentile_ms(0.99),
            )
            for step in steps
        ],
        inference_volume_by_status=[
            InferenceVolumeByStatusDatapointV1(
                timestamp=iso(step.start),
                status_2xx=_rate(step, 2, divisor_s),
                status_4xx=_rate(step, 4, divisor_s),
                status_5xx=_rate(step, 5, divisor_s),
            )
            for step in steps
        ],
        publish_logprob_gap=[
            _point(step, step.sums.publish_gap) for step in steps if step.sums.publish_gap is not None
        ],
        per_node_metrics=[LoopsDeploymentNodeMetricsV1(node_id=NODE, **machine.model_dump())],
        **machine.model_dump(),
    )


def _machine(steps: list[Step]) -> NodeMetricsV1:
    """Averages over the looks of each step."""

    def series(name: str) -> list[MetricV1]:
        return [_point(step, getattr(step.sums, name) / step.sums.num_looks) for step in steps]

    indices = sorted({index for step in steps for index in step.sums.gpus})
    return NodeMetricsV1(
        gpu_memory_usage_bytes={str(i): _gpu(steps, i, "memory_bytes") for i in indices},
        gpu_utilization={str(i): _gpu(steps, i, "utilization") for i in indices},
        cpu_usage=series("cpu_cores"),
        cpu_memory_usage_bytes=series("memory_bytes"),
        ephemeral_storage=StorageMetricsV1(
            usage_bytes=series("disk_used_bytes"),
            utilization=[_point(step, _disk_fraction(step.sums)) for step in steps],
        ),
    )


def _gpu(steps: list[Step], index: int, name: str) -> list[MetricV1]:
    with_gpu = [(step, step.sums.gpus[index]) for step in steps if index in step.sums.gpus]
    return [_point(step, getattr(gpu, name) / gpu.num) for step, gpu in with_gpu]


def _disk_fraction(sums: Minute) -> float:
    return sums.disk_used_bytes / sums.disk_total_bytes if sums.disk_total_bytes else 0.0


def _rate(step: Step, status_class: int, divisor_s: int) -> float:
    return step.sums.statuses.get(status_class, 0) * divisor_s / step.seconds


def _point(step: Step, value: float) -> MetricV1:
    return MetricV1(value=value, timestamp=iso(step.start))
