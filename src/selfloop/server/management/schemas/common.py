"""What the bodies and answers of several resources share."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from selfloop.types.status import SamplerStatus


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Answer(BaseModel):
    """Base of answers."""


class Paged(Answer):
    """Base of lists, which come in pages when ``page_size`` or ``page_token`` is given."""

    next_page_token: str | None = Field(None, description="In pages alone: for the next one; null on the last.")


def iso(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class UserV1(Answer):
    """Whoever holds the API key; the key's name stands where the hosted API has an e-mail address."""

    email: str | None = None


class CapacityV1(Answer):
    """Of which kind it is, whether a run or sampler shares what another one brought up, and why."""

    kind: Literal["dedicated", "serverless"]
    reused: bool
    reused_from: str | None = Field(description="The run (of a sampler: the sampler) whose capacity it shares.")
    reason: str


class DeploymentStatusV1(StrEnum):
    """Where sampling capacity is in its life, from its first build to its end."""

    BUILDING = SamplerStatus.BUILDING
    DEPLOYING = SamplerStatus.DEPLOYING
    DEPLOY_FAILED = SamplerStatus.DEPLOY_FAILED
    LOADING_MODEL = SamplerStatus.LOADING_MODEL
    ACTIVE = SamplerStatus.ACTIVE
    UNHEALTHY = SamplerStatus.UNHEALTHY
    BUILD_FAILED = SamplerStatus.BUILD_FAILED
    BUILD_STOPPED = SamplerStatus.BUILD_STOPPED
    DEACTIVATING = SamplerStatus.DEACTIVATING
    INACTIVE = SamplerStatus.INACTIVE
    FAILED = SamplerStatus.FAILED
    UPDATING = SamplerStatus.UPDATING
    SCALED_TO_ZERO = SamplerStatus.SCALED_TO_ZERO
    WAKING_UP = SamplerStatus.WAKING_UP


class InstanceTypeV1(Answer):
    """The machine that serves: this one."""

    id: str
    name: str
    memory_limit_mib: int
    millicpu_limit: int
    gpu_count: int
    gpu_type: str | None
    gpu_memory_limit_mib: int | None


# A string in the create-run specification, and in our document unless the server offers serverless capacity.
CapacityId = Annotated[str | None, Field(description="An id of its capacity. Serverless capacity has none: null.")]


PINNED = "The pinned revision that the base model is: hf://<org>/<repo>@<revision>. Null: it was added without one."

SCOPE: Any = Field(
    "default",
    description="The kind of capacity: 'serverless' is refused where it cannot be had, 'deployment' is dedicated, and "
    "'default' leaves it to the server.",
)


class LoopsLoRAConfigV1(Answer):
    """What an adapter sits on."""

    config_version: str
    targets: list[str]
    expert_layout: None = None


class DeactivateLoopsRunResponseV1(Answer):
    """The run that was deactivated, with its owner."""

    id: str
    base_model: str
    user: UserV1


class DeactivateLoopsSamplerResponseV1(Answer):
    """The sampler that was deactivated, with its owner."""

    id: str
    base_model: str
    user: UserV1


class DeactivateLoopsDeploymentResponseV1(Answer):
    """The trainer deployment that was deactivated, with its owner."""

    id: str
    base_model: str
    user: UserV1
