"""Sessions and runs."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from selfloop.server.management.schemas.common import Answer, CapacityId, CapacityV1, LoRAConfigV1, Request, UserV1
from selfloop.server.management.schemas.samplers import LoopsSamplerV1
from selfloop.types.status import RunStatus


class CreateLoopsSessionRequestV1(Request):
    training_project_id: StrictStr | None = Field(None, description="A label of the caller's, kept with the session.")


class CreateLoopsRunRequestV1(Request):
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


class LoopsRunStatusV1(Answer):
    name: RunStatus


class LoopsRunV1(Answer):
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


class CreateLoopsRunResponseV1(Answer):
    run: LoopsRunV1


class LoopsTrainerResponseV1(Answer):
    run: LoopsTrainerRunV1


class ListLoopsRunsResponseV1(Answer):
    runs: list[LoopsTrainerRunV1]


class LoopsSessionV1(Answer):
    id: str


class LoopsSessionResponseV1(Answer):
    session: LoopsSessionV1
