"""Logs, metrics, debug archives and usage."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from selfloop.server.management.schemas.common import Answer, Paged, Request

_LAST_MS = 253_402_300_799_000
"""The end of the year 9999."""

EpochMillis = Annotated[int, Field(ge=0, le=_LAST_MS)]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class LogsQueryV1(Request):
    """Which lines of a log."""

    start_epoch_millis: EpochMillis | None = Field(
        None, description="Where to start. Defaults to 30 minutes before the end; at most 7 days before it."
    )
    end_epoch_millis: EpochMillis | None = Field(None, description="Where to stop. Defaults to now.")
    direction: Literal["asc", "desc"] | None = Field(None, description="Order by time; `desc` unless given.")
    limit: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="At most so many; 500 unless given.")
    min_level: Level | None = Field(None, description="Leave out lines below this level, and lines without one.")


class GetDeploymentLogsRequestV1(LogsQueryV1):
    replica: Annotated[StrictStr, Field(max_length=256)] | None = Field(
        None, description="Lines of this replica; every line here is of `local`."
    )
    request_id: Annotated[StrictStr, Field(max_length=256)] | None = Field(
        None, description="Lines about this operation or sample."
    )
    component: StrictStr | None = Field(None, description="Only null: lines have no component.")
    search_pattern: StrictStr | None = Field(None, description="Only null: use `includes` and `excludes`.")
    includes: Annotated[list[StrictStr], Field(max_length=8)] | None = Field(
        None, description="Substrings that the message must all have."
    )
    excludes: Annotated[list[StrictStr], Field(max_length=8)] | None = Field(
        None, description="Substrings of which the message must have none."
    )


class LogV1(Answer):
    timestamp: str = Field(description="UNIX time in nanoseconds.")
    message: str = Field(description="The message, with the traceback of a failure after it.")
    replica: str | None
    request_id: str | None = Field(None, description="The operation or sample that the line is about.")
    level: Level | None = None


class GetLogsResponseV1(Answer):
    logs: list[LogV1]


class GetLoopsDeploymentMetricsRequestV1(Request):
    start_epoch_millis: Annotated[StrictInt, Field(ge=0, le=_LAST_MS)] | None = Field(
        None, description="Where to start. Defaults to an hour before the end; metrics are kept for a day."
    )
    end_epoch_millis: Annotated[StrictInt, Field(ge=0, le=_LAST_MS)] | None = Field(
        None, description="Where to end. Defaults to now."
    )
    step_seconds: Annotated[StrictInt, Field(ge=60, le=86_400, multiple_of=60)] | None = Field(
        None, description="Resolution: a multiple of 60. Defaults to what gives at most 120 points."
    )
    time_divisor_seconds: Annotated[StrictInt, Field(ge=1, le=86_400)] | None = Field(
        None, description="Unit of time of request volumes, in seconds. Defaults to 1: requests a second."
    )


class MetricV1(Answer):
    value: float
    timestamp: datetime = Field(description="Start of the step.")


class StorageMetricsV1(Answer):
    usage_bytes: list[MetricV1] = Field(description="Bytes used of the disk that holds the data directory.")
    utilization: list[MetricV1] = Field(description="The same as a fraction of the disk.")


class NodeMetricsV1(Answer):
    gpu_memory_usage_bytes: dict[str, list[MetricV1]] = Field(description="By GPU; empty without NVIDIA's library.")
    gpu_utilization: dict[str, list[MetricV1]] = Field(description="Fraction of time, by GPU.")
    cpu_usage: list[MetricV1] = Field(description="Cores that the deployment's worker used.")
    cpu_memory_usage_bytes: list[MetricV1] = Field(description="Resident bytes of the deployment's worker.")
    ephemeral_storage: StorageMetricsV1


class LoopsDeploymentNodeMetricsV1(NodeMetricsV1):
    node_id: str


class ResponseTimeDatapointV1(Answer):
    """Percentiles in milliseconds, within 10%."""

    timestamp: datetime
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class InferenceVolumeByStatusDatapointV1(Answer):
    timestamp: datetime
    status_2xx: float
    status_4xx: float
    status_5xx: float


class LoopsDeploymentMetricsV1(NodeMetricsV1):
    inference_volume: list[MetricV1] = Field(description="Operations and samples that ended, per unit of time.")
    concurrent_requests: list[MetricV1] = Field(description="Operations and samples in progress, on average.")
    response_time_stats: list[ResponseTimeDatapointV1]
    inference_volume_by_status: list[InferenceVolumeByStatusDatapointV1]
    per_node_metrics: list[LoopsDeploymentNodeMetricsV1]
    publish_logprob_gap: list[MetricV1] = Field(
        description="Largest mean difference of trainer's and sampler's logprobs after a publish, in nats."
    )


class GetLoopsDeploymentMetricsResponseV1(Answer):
    deployment_id: str
    metrics: LoopsDeploymentMetricsV1


class LoopsDebugArchiveFileV1(Answer):
    url: str = Field(description="Works without a key for an hour.")
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int
    last_modified: datetime


class LoopsDebugArchiveFilesResponseV1(Answer):
    presigned_urls: list[LoopsDebugArchiveFileV1]
    next_page_token: str | None = None


class LoopsUsageV1(Answer):
    id: str | None = Field(description="The run's, key's or team's; null for samples of base models.")
    name: str
    operations: int = Field(description="Operations that gave a result.")
    samples: int = Field(description="Sampling requests answered.")
    tokens_trained: int = Field(description="Tokens whose loss counted in a backward pass.")
    tokens_forwarded: int = Field(description="Tokens that operations sent through the model.")
    tokens_prefilled: int = Field(description="Tokens of sampling prompts.")
    tokens_sampled: int
    compute_seconds: float = Field(description="Seconds that a worker computed for it.")
    checkpoint_bytes: int = Field(description="Stored now.")


class LoopsUsageResponseV1(Paged):
    group_by: Literal["run", "key", "team"]
    usage: list[LoopsUsageV1]
