"""Deployments of trainers."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from selfloop.server.management.schemas.common import Answer, InstanceTypeV1, Paged, UserV1
from selfloop.server.management.schemas.samplers import LoopsSamplerV1
from selfloop.types.status import DeploymentStatus


class LoopsDeploymentStatusV1(Answer):
    name: DeploymentStatus
    reason: str = Field("", description="Why, in words.")


class LoopsDeploymentV1(Answer):
    id: str
    active_run_id: str | None
    latest_run_id: str | None
    base_model: str
    base_url: str
    status: LoopsDeploymentStatusV1
    user: UserV1
    created_at: datetime
    availability_model: Literal["dedicated"] = "dedicated"
    scale_down_delay_seconds: int
    instance_type: InstanceTypeV1
    node_count: int = 1
    sampler: LoopsSamplerV1 | None


class GetLoopsDeploymentResponseV1(Answer):
    deployment: LoopsDeploymentV1


class ListLoopsDeploymentsResponseV1(Paged):
    deployments: list[LoopsDeploymentV1]
