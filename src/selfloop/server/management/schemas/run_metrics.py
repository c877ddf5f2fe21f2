"""What the operations of a run measured."""

from typing import Annotated

from pydantic import Field, StringConstraints

from selfloop.server.management.schemas.common import Answer

MAX_NAMES = 100
MAX_LIMIT = 5000
MAX_POINTS = 5000
MAX_STREAM_S = 3600.0

Names = Annotated[str, StringConstraints(max_length=8000)]


class SeriesV1(Answer):
    """One quantity; its lists are of one length."""

    name: str = Field(description="`train/...` (forward_backward), `forward/...` or `optim/...` (optim_step).")
    numbers: list[int] = Field(description="Of the measurements, ascending: 1 is the run's first.")
    steps: list[int] = Field(description="Optimizer steps that they belong to, from 1.")
    times: list[float] = Field(description="When they were made, in UNIX seconds.")
    values: list[float | None] = Field(description="Null where one is not finite.")


class RunMetricsV1(Answer):
    run_id: str
    series: list[SeriesV1] = Field(description="By name.")
    last: int = Field(description="Number of the last measurement looked at; `after` when there was none.")
    next_after: int | None = Field(description="`after` of the next page; null on the last.")


class PointV1(Answer):
    """An event `metrics` of the stream: what one operation measured."""

    number: int
    kind: str = Field(description="Of the operation: `forward`, `forward_backward` or `optim_step`.")
    step: int
    at: float = Field(description="UNIX seconds.")
    values: dict[str, float | None]
