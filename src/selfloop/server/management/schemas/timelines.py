"""The timeline of a run."""

from pydantic import Field

from selfloop.server.management.schemas.common import Answer

MAX_SPANS = 5000


class SpanV1(Answer):
    """An operation or a sample; times in UNIX seconds."""

    about: str = Field(description="Id of the run, or of the sampler of its weights.")
    kind: str = Field(description="Of the operation, or `sample`.")
    operation_id: str = Field(description="Empty where it has none.")
    accepted: float = Field(description="When it began to wait.")
    begun: float = Field(description="When its computing began, had it been computed in one go up to its end.")
    ended: float
    tokens: int | None
    error: str = Field(description="Empty where it succeeded.")


class RunTimelineV1(Answer):
    run_id: str
    spans: list[SpanV1] = Field(description="By their ends, oldest first.")
    is_whole: bool = Field(description="False where there are older ones.")
