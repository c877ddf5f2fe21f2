"""The worker groups of this server."""

from pydantic import Field

from selfloop.server.management.schemas.common import Answer, Request


class WorkerGroupV1(Answer):
    """A worker of a base model, or its place where none is running."""

    name: str
    base_model: str = Field(description="As the catalogue calls it.")
    state: str = Field(description="stopped, preparing, loading, ready, restarting, crashing or failed.")
    reason: str = Field(description="Why it is in its state, in words.")
    drained: bool = Field(description="It takes nothing new, until it is told to again or the server is restarted.")
    pid: int | None = Field(description="Of its worker, where that is a process of this machine.")
    num_deployments: int = Field(description="Trainer deployments that live in it, of all teams.")
    num_samplers: int = Field(description="Samplers that live in it, of all teams.")


class ClusterV1(Answer):
    groups: list[WorkerGroupV1] = Field(description="Of every base model that was used since the server's start.")


class DrainRequestV1(Request):
    group: str = Field(description="The worker group's name.", max_length=512)


class MoveRunRequestV1(Request):
    group: str | None = Field(
        None, description="The worker group's name; null is the one with the fewest.", max_length=512
    )


class WorkerGroupAnswerV1(Answer):
    group: WorkerGroupV1
