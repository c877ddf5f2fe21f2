"""Deployed models."""

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field

from selfloop.server.management.schemas.common import Answer, DeploymentStatusV1, Paged


class AutoscalingSettingsV1(Answer):
    min_replica: int
    max_replica: int = 1
    autoscaling_window: int | None = None
    scale_down_delay: int | None
    concurrency_target: int = Field(description="Sequences that one worker samples at a time.")
    target_utilization_percentage: int | None = None


class RequestBackpressureSettingsV1(Answer):
    policy: Literal["QUEUE_ON_FULL"] = "QUEUE_ON_FULL"


class DeploymentV1(Answer):
    """A sampler as a deployment of a model; what the clients poll to learn whether it is ready."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    created_at: datetime
    name: str
    model_id: str
    is_production: bool
    is_development: bool = False
    status: DeploymentStatusV1
    reason: str
    active_replica_count: int
    autoscaling_settings: AutoscalingSettingsV1
    instance_type_name: str
    environment: str | None
    labels: dict[str, str] | None
    region: None = None
    request_backpressure_settings: RequestBackpressureSettingsV1 = RequestBackpressureSettingsV1()
    sampler_id: str
    base_url: str
    checkpoints: list[str] = Field(description="URIs of what it serves, the default first.")


class DeploymentsV1(Paged):
    deployments: list[DeploymentV1]


class ModelV1(Answer):
    id: str
    created_at: datetime
    name: str
    deployments_count: int
    production_deployment_id: str | None
    development_deployment_id: str | None = None
    instance_type_name: str
    team_name: str


class ModelsV1(Paged):
    models: list[ModelV1]


class DeactivateResponseV1(Answer):
    success: bool = True
    no_op: bool
