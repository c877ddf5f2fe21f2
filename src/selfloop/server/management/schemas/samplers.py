"""Samplers."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field, StrictInt, StrictStr

from selfloop.control.capacity.placement import Scope
from selfloop.server.management.schemas.common import (
    PINNED,
    SCOPE,
    Answer,
    CapacityId,
    CapacityV1,
    DeploymentStatusV1,
    InstanceTypeV1,
    Paged,
    Request,
    UserV1,
)


class LoopsSamplerStatusV1(Answer):
    """Whether a sampler can be asked now."""

    name: DeploymentStatusV1 = Field(description="At the time of the answer.")
    reason: str = Field("", description="Why, in words.")


class LoopsSamplerV1(Answer):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    base_url: str
    base_model: str = Field(description="What it samples, with or without an adapter on it.")
    created_at: datetime
    model_id: CapacityId
    deployment_id: CapacityId
    status: LoopsSamplerStatusV1
    run_id: str | None = None
    user: UserV1
    instance_type: InstanceTypeV1
    node_count: int = 1
    standing: bool = Field(False, description="Whether it never scales to zero: a deployed one.")
    capacity: CapacityV1
    base_checkpoint: str | None = Field(description=PINNED)


class CreateLoopsSamplerRequestV1(Request):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    session_id: StrictStr
    run_id: StrictStr | None = Field(None, description="Pair with this run (one sampler a run).")
    base_model: StrictStr | None = None
    model_path: StrictStr | None = Field(None, description="bt:// URI of a checkpoint to serve.")
    max_seq_length: StrictInt | None = None
    num_replicas: StrictInt | None = Field(None, description="Only 1.")
    availability_model: Literal["dedicated", "spot"] | None = Field(
        None, description="Only 'dedicated'; of a paired sampler its run's, which is that, too."
    )
    reuse_from_session_id: StrictStr | None = None
    scope: Scope = SCOPE


class CreateLoopsSamplerResponseV1(Answer):
    sampler: LoopsSamplerV1


class GetLoopsSamplerResponseV1(Answer):
    sampler: LoopsSamplerV1


class ListLoopsSamplersResponseV1(Paged):
    samplers: list[LoopsSamplerV1]


class NewestWeightsV1(Answer):
    """Which weights a sampler of a run's newest ones serves."""

    run_id: str
    step: int = Field(description="Optimizer steps in them; 0 is an untrained run, which samples as its base model.")
    path: str | None = Field(None, description="The checkpoint that an ended run left; null for a live run's own.")


class NewestSamplerResponseV1(Answer):
    sampler: LoopsSamplerV1
    weights: NewestWeightsV1
