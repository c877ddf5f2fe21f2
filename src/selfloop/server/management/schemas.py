"""Bodies and answers, under the specification's own schema names. Unknown fields are refused."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

from selfloop.server.management.observation_schemas import GetDeploymentLogsRequestV1 as GetDeploymentLogsRequestV1
from selfloop.server.management.observation_schemas import (
    GetLoopsDeploymentMetricsRequestV1 as GetLoopsDeploymentMetricsRequestV1,
)
from selfloop.types.status import DeploymentStatus, RunStatus, SamplerStatus


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Answer(BaseModel):
    """Base of answers."""


def iso(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class CreateLoopsSessionRequestV1(_Request):
    training_project_id: StrictStr | None = Field(None, description="A label of the caller's, kept with the session.")


class CreateLoopsRunRequestV1(_Request):
    session_id: StrictStr = Field(description="ID of the Loops session this run belongs to.")
    base_model: StrictStr = Field(description="Base model ID (e.g. 'Qwen/Qwen3-8B').")
    max_seq_len: StrictInt | None = Field(
        None, description="Longest sequence (in tokens) the run must handle. Defaults to the model's own maximum."
    )
    lora_rank: StrictInt = Field(64, description="LoRA rank.")
    seed: StrictInt | None = Field(None, description="Random seed for reproducibility.")
    scale_down_delay_seconds: Annotated[StrictInt, Field(gt=0)] = Field(
        3600, description="Seconds of inactivity before the run scales to zero. Must be positive."
    )
    path: StrictStr | None = Field(
        None,
        description="bt:// URI of a trainer checkpoint to load weights from on startup.",
        examples=["bt://loops:k4q95w5/weights/step-100"],
    )
    reuse_from_session_id: StrictStr | None = Field(
        None, description="Session whose trainer deployment to reuse, best-effort; of the same team."
    )
    reuse_from_run_id: StrictStr | None = Field(
        None, description="Run whose trainer deployment to reuse, best-effort; of the same team."
    )
    name: Annotated[StrictStr, Field(min_length=1, max_length=255)] | None = Field(
        None, description="Display name. Defaults to the base model's."
    )
    availability_model: Literal["dedicated", "spot"] = Field(
        "dedicated", description="Only 'dedicated': this server's capacity is never preempted."
    )
    keep_last_checkpoints: StrictInt | None = Field(
        None,
        description="Keep only so many of the newest trainer checkpoints and of the newest sampler checkpoints; "
        "what a live sampler or a queued operation needs stays. Null keeps all.",
    )
    replicas: StrictInt = Field(1, description="Only 1.")
    sampler_num_replicas: StrictInt | None = Field(None, description="Only 1.")
    base_checkpoint: StrictStr | None = Field(None, description="Not served: add the model to the catalogue.")


class UserV1(_Answer):
    """Whoever holds the API key; the key's name stands where the hosted API has an e-mail address."""

    email: str | None = None


class CapacityV1(_Answer):
    """Whether a run or sampler shares what another one brought up, and why it does or does not."""

    reused: bool
    reused_from: str | None = Field(description="The run (of a sampler: the sampler) whose capacity it shares.")
    reason: str


class DeploymentStatusV1(StrEnum):
    """The status of a deployment."""

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


class LoopsSamplerStatusV1(_Answer):
    """The current status of a Loops sampler."""

    name: DeploymentStatusV1 = Field(description="The current status of the Loops sampler.")
    reason: str = Field("", description="Why, in words.")


class InstanceTypeV1(_Answer):
    """The machine that serves: this one."""

    id: str
    name: str
    memory_limit_mib: int
    millicpu_limit: int
    gpu_count: int
    gpu_type: str | None
    gpu_memory_limit_mib: int | None


# The specification's type; a server that was told to answer as serverless departs from it.
CapacityId = Annotated[
    str | None,
    Field(description="Null from a server that answers as serverless capacity."),
    WithJsonSchema({"type": "string"}),
]


class LoopsSamplerV1(_Answer):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    base_url: str
    base_model: str = Field(description="The HuggingFace base model the sampler is serving.")
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


class LoRAConfigV1(_Answer):
    """What an adapter sits on."""

    config_version: str
    targets: list[str]
    expert_layout: None = None


class LoopsRunStatusV1(_Answer):
    name: RunStatus


class LoopsRunV1(_Answer):
    id: str = Field(description="The run ID.")
    session_id: str = Field(description="The session ID this run belongs to.")
    base_model: str = Field(description="The HuggingFace base model the run is fine-tuning.")
    base_url: str = Field(description="The run's base URL.")
    created_at: datetime = Field(description="Time the run was created in ISO 8601 format")
    sampler: LoopsSamplerV1 = Field(description="The sampler bound to this run.")
    name: str
    deployment_id: CapacityId
    lora_rank: int
    max_seq_len: int
    seed: int
    status: LoopsRunStatusV1
    user: UserV1
    lora_config_version: str
    lora_config: LoRAConfigV1
    keep_last_checkpoints: int | None
    capacity: CapacityV1


class LoopsTrainerRunV1(LoopsRunV1):
    """A run that may not have its sampler yet."""

    sampler: LoopsSamplerV1 | None = None  # type: ignore[assignment]


class CreateLoopsRunResponseV1(_Answer):
    run: LoopsRunV1


class LoopsTrainerResponseV1(_Answer):
    run: LoopsTrainerRunV1


class ListLoopsRunsResponseV1(_Answer):
    runs: list[LoopsTrainerRunV1]


class DeactivatedV1(_Answer):
    """What was deactivated: a run, a sampler or a deployment, with its owner."""

    id: str
    base_model: str
    user: UserV1


class LoopsSessionV1(_Answer):
    id: str


class LoopsSessionResponseV1(_Answer):
    session: LoopsSessionV1


class CreateLoopsSamplerRequestV1(_Request):
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


class LoopsSamplerResponseV1(_Answer):
    sampler: LoopsSamplerV1


class ListLoopsSamplersResponseV1(_Answer):
    samplers: list[LoopsSamplerV1]


class LoopsDeploymentStatusV1(_Answer):
    name: DeploymentStatus
    reason: str = Field("", description="Why, in words.")


class LoopsDeploymentV1(_Answer):
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


class LoopsDeploymentResponseV1(_Answer):
    deployment: LoopsDeploymentV1


class ListLoopsDeploymentsResponseV1(_Answer):
    deployments: list[LoopsDeploymentV1]


class LoraAdapterConfigV1(_Answer):
    r: int
    lora_alpha: float


class LoopsCheckpointV1(_Answer):
    id: str
    checkpoint_id: str = Field(description="The name it was saved under.")
    run_id: str
    base_model: str
    checkpoint_type: Literal["lora"] = "lora"
    created_at: datetime
    lora_adapter_config: LoraAdapterConfigV1
    lora_config: LoRAConfigV1
    size_bytes: int
    sync_status: Literal["COMPLETE"] = "COMPLETE"
    target: Literal["trainer", "sampler"]
    path: str
    step: int
    expires_at: datetime | None


class ListLoopsCheckpointsResponseV1(_Answer):
    checkpoints: list[LoopsCheckpointV1]


class ValidateLoopsCheckpointRequestV1(_Request):
    checkpoint_path: StrictStr
    run_id: StrictStr | None = None


class CheckpointFileV1(_Answer):
    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int
    last_modified: datetime


class CheckpointFilesResponseV1(_Answer):
    presigned_urls: list[CheckpointFileV1]
    next_page_token: int | None
    total_count: int


class CheckpointSourceV1(_Answer):
    kind: Literal["s3"] = "s3"


class CheckpointSourceResponseV1(_Answer):
    source: CheckpointSourceV1 = CheckpointSourceV1()


class EnablementDetailsV1(_Answer):
    """Why a model cannot be used now, and what would change that."""

    reason: str
    reason_detail: str
    remediation: str


class SupportedModelV1(_Answer):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    max_seq_len: int
    max_enabled_seq_len: int
    max_context_length: int
    supports_vision_language: bool = False
    enabled: bool = True
    serverless: bool = False
    enablement_details: EnablementDetailsV1 | None = None


class CapabilitiesResponseV1(_Answer):
    supported_models: list[SupportedModelV1]


class TeamV1(_Answer):
    id: str
    name: str
    default: bool
    created_at: datetime


class TeamsResponseV1(_Answer):
    teams: list[TeamV1]


class LoopsUserConfigV1(_Answer):
    trainer_accelerator_priority: list[str] | None
    sampler_accelerator_priority: list[str] | None


class LoopsUserConfigResponseV1(_Answer):
    user_config: LoopsUserConfigV1


class PatchLoopsUserConfigRequestV1(_Request):
    """Omit to leave, null to clear, a list to set."""

    trainer_accelerator_priority: list[StrictStr] | None = None
    sampler_accelerator_priority: list[StrictStr] | None = None


class DeployLoopsCheckpointRequestV1(_Request):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    checkpoint_ids: list[StrictStr] = Field(
        description="Sampler checkpoints of one base model; the first is what is served by default."
    )
    model_name: StrictStr = Field(description="A known name gets a further version.")
    instance_type_id: StrictStr = Field(description="This machine's: 'local'.")
    hf_secret_name: StrictStr = Field(description="A label, kept with the deployment: nothing is fetched from a hub.")


class DeployLoopsCheckpointResponseV1(_Answer):
    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    deployment_id: str


class DeleteLoopsCheckpointsRequestV1(_Request):
    """At least one filter; all that are given must hold."""

    run_id: StrictStr | None = None
    base_model: StrictStr | None = None
    target: Literal["trainer", "sampler"] | None = None
    name: StrictStr | None = Field(None, description="A shell pattern of the names, e.g. 'step-*'.")
    older_than_seconds: Annotated[StrictInt, Field(ge=0)] | None = None
    keep_last: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Spare the newest so many of each run and target."
    )
    scope: Literal["org"] | None = Field(None, description="'org': of the whole team, not only of your own runs.")
    dry_run: StrictBool = Field(True, description="Only tell what would be deleted.")


class KeptCheckpointV1(_Answer):
    checkpoint: LoopsCheckpointV1
    reason: str


class DeleteLoopsCheckpointsResponseV1(_Answer):
    """What was deleted (with ``dry_run`` what would be), and what matched and stays."""

    dry_run: bool
    deleted: list[LoopsCheckpointV1]
    kept: list[KeptCheckpointV1]
    size_bytes: int = Field(description="Of what was, or would be, deleted.")


class InstanceTypesV1(_Answer):
    instance_types: list[InstanceTypeV1]


class InstanceTypeWithPriceV1(_Answer):
    instance_type: InstanceTypeV1
    price: float = 0.0
    """USD a minute: nothing, it is your machine."""


class InstanceTypePricesV1(_Answer):
    instance_types: list[InstanceTypeWithPriceV1]


KeyType = Literal["PERSONAL", "WORKSPACE_MANAGE_ALL"]
_ROLES = Literal["admin", "member", "read-only"]


class CreateAPIKeyRequestV1(_Request):
    name: Annotated[StrictStr, Field(min_length=1, max_length=255)] | None = Field(
        None, description="What the key is for. Defaults to the role."
    )
    type: KeyType = Field(
        "PERSONAL", description="PERSONAL makes a member's key, WORKSPACE_MANAGE_ALL an admin's; see `role`."
    )
    role: _ROLES | None = Field(None, description="What the key may do; goes before `type`.")
    expires_in_seconds: Annotated[StrictInt, Field(gt=0, le=10 * 365 * 86400)] | None = Field(
        None, description="How long the key is valid; null: until it is revoked."
    )
    model_ids: Annotated[list[StrictStr], Field(max_length=0)] | None = Field(
        None, description="Only null or empty: a key is good for the models of its whole team."
    )
    team_id: StrictStr | None = Field(None, description="The caller's team, which every key of it is made in.")


class APIKeyV1(_Answer):
    api_key: str = Field(description="The key. It is not shown again.")


class APIKeyOwnerV1(_Answer):
    user_id: str
    email: str | None
    name: str | None


class APIKeyInfoV1(_Answer):
    id: str
    prefix: str = Field(description="The key's first characters.")
    name: str | None
    type: KeyType
    role: _ROLES
    model_ids: list[str] | None = None
    team_name: str | None
    owner: APIKeyOwnerV1
    created_at: datetime
    expires_at: datetime | None


class APIKeysV1(_Answer):
    keys: list[APIKeyInfoV1]


class APIKeyTombstoneV1(_Answer):
    prefix: str


class UserInfoV1(_Answer):
    user_id: str
    email: str | None
    name: str | None
    workspace_name: str | None
    role: _ROLES


class PaginationV1(_Answer):
    has_more: bool
    cursor: str | None


class UsersResponseV1(_Answer):
    items: list[UserInfoV1]
    pagination: PaginationV1


class AutoscalingSettingsV1(_Answer):
    min_replica: int
    max_replica: int = 1
    autoscaling_window: int | None = None
    scale_down_delay: int | None
    concurrency_target: int = Field(description="Sequences that one worker samples at a time.")
    target_utilization_percentage: int | None = None


class RequestBackpressureSettingsV1(_Answer):
    policy: Literal["QUEUE_ON_FULL"] = "QUEUE_ON_FULL"


class ModelDeploymentV1(_Answer):
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


class ModelDeploymentsV1(_Answer):
    deployments: list[ModelDeploymentV1]


class ModelV1(_Answer):
    id: str
    created_at: datetime
    name: str
    deployments_count: int
    production_deployment_id: str | None
    development_deployment_id: str | None = None
    instance_type_name: str
    team_name: str


class ModelsV1(_Answer):
    models: list[ModelV1]


class DeactivateResponseV1(_Answer):
    success: bool = True
    no_op: bool
