"""Bodies and answers, under the specification's own schema names. Unknown fields are refused."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

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
    name: StrictStr | None = Field(None, description="Display name. Defaults to the base model's.")
    availability_model: Literal["dedicated", "spot"] = Field(
        "dedicated", description="Only 'dedicated': this server's capacity is never preempted."
    )
    replicas: StrictInt = Field(1, description="Only 1.")
    sampler_num_replicas: StrictInt | None = Field(None, description="Only 1.")
    base_checkpoint: StrictStr | None = Field(None, description="Not served: add the model to the catalogue.")


class UserV1(_Answer):
    email: str | None = None


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


class LoopsSamplerV1(_Answer):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    base_url: str
    base_model: str = Field(description="The HuggingFace base model the sampler is serving.")
    created_at: datetime
    model_id: str
    deployment_id: str
    status: LoopsSamplerStatusV1
    run_id: str | None = None
    user: UserV1 = UserV1()
    node_count: int = 1


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
    deployment_id: str
    lora_rank: int
    max_seq_len: int
    seed: int
    status: LoopsRunStatusV1
    user: UserV1 = UserV1()


class LoopsTrainerRunV1(LoopsRunV1):
    """A run that may not have its sampler yet."""

    sampler: LoopsSamplerV1 | None = None  # type: ignore[assignment]


class CreateLoopsRunResponseV1(_Answer):
    run: LoopsRunV1


class LoopsTrainerResponseV1(_Answer):
    run: LoopsTrainerRunV1


class ListLoopsRunsResponseV1(_Answer):
    runs: list[LoopsTrainerRunV1]


class DeactivateLoopsRunResponseV1(_Answer):
    id: str
    base_model: str
    user: UserV1 = UserV1()


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
    availability_model: Literal["dedicated", "spot"] = "dedicated"
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
    user: UserV1 = UserV1()
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
    size_bytes: int
    sync_status: str | None = None
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


class SupportedModelV1(_Answer):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    max_seq_len: int
    max_enabled_seq_len: int
    max_context_length: int
    supports_vision_language: bool = False
    enabled: bool = True
    serverless: bool = False


class CapabilitiesResponseV1(_Answer):
    supported_models: list[SupportedModelV1]


class TeamV1(_Answer):
    id: str
    name: str
    default: bool
    created_at: datetime


class TeamsResponseV1(_Answer):
    teams: list[TeamV1]


class DeploymentReadinessV1(_Answer):
    """What the clients poll to learn whether a sampler is ready."""

    id: str
    status: DeploymentStatusV1
    reason: str
