"""Requests of the Tinker client in JSON. Unknown fields are refused."""

from datetime import datetime
from typing import Any, Literal

import msgspec

from selfloop.server.shared.schemas import Schemas
from selfloop.types.custom_loss import LossInput, Node

SCHEMAS = Schemas("Tinker")
"""The structs of this dialect that the OpenAPI document shows."""


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all request structs."""


class Config(_Wire, frozen=True, kw_only=True):
    sdk_version: str | None = None


class CreateSession(_Wire, frozen=True, kw_only=True):
    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None
    type: Literal["create_session"] = "create_session"


class Heartbeat(_Wire, frozen=True, kw_only=True):
    session_id: str
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(_Wire, frozen=True, kw_only=True):
    type: Literal["success", "errored", "interrupted"]


class Finish(_Wire, frozen=True, kw_only=True):
    reason: FinishReason
    detail: str | None = None


class LoraConfig(_Wire, frozen=True, kw_only=True):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class UploadStart(_Wire, frozen=True, kw_only=True):
    base_model: str
    lora_config: LoraConfig = LoraConfig()
    destination_project_id: str | None = None


class UploadFinish(_Wire, frozen=True, kw_only=True):
    upload_id: str


class OptimizerConfig(_Wire, frozen=True, kw_only=True):
    type: str = "adamw"
    version: int | None = None


class CreateModel(_Wire, frozen=True, kw_only=True):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: Literal["create_model"] = "create_model"


class Model(_Wire, frozen=True, kw_only=True):
    model_id: str
    type: Literal["get_info", "unload_model"] | None = None


class AdamParams(_Wire, frozen=True, kw_only=True):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Operation(_Wire, frozen=True, kw_only=True):
    """What every operation carries."""

    model_id: str
    seq_id: int


class OptimStep(Operation, frozen=True, kw_only=True):
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None
    type: Literal["optim_step"] = "optim_step"


class SaveWeights(Operation, frozen=True, kw_only=True):
    path: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSampler(Operation, frozen=True, kw_only=True):
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: str = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternal(Operation, frozen=True, kw_only=True):
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class LoadWeights(_Wire, frozen=True, kw_only=True):
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class CustomLossGraph(_Wire, frozen=True, kw_only=True):
    format: int = 1
    nodes: list[Node]


class CreateCustomLoss(_Wire, frozen=True, kw_only=True):
    session_id: str
    custom_loss_seq_id: int
    name: str
    inputs: list[LossInput]
    graph: CustomLossGraph
    type: Literal["create_custom_loss"] = "create_custom_loss"


class CreateSamplingSession(_Wire, frozen=True, kw_only=True):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinSamplingSession(_Wire, frozen=True, kw_only=True):
    sampling_session_id: str
    type: Literal["join_sampling_session"] = "join_sampling_session"


class CancelFuture(_Wire, frozen=True, kw_only=True):
    request_id: str


class SamplingSessionTarget(_Wire, frozen=True, kw_only=True):
    sampling_session_id: str
    cloned_sampler_id: int = 0
    type: Literal["sampling_session"] = "sampling_session"


class RetrieveFutures(_Wire, frozen=True, kw_only=True):
    target: SamplingSessionTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class EncodedText(_Wire, frozen=True, kw_only=True, tag="encoded_text"):
    tokens: list[int]


class Image(_Wire, frozen=True, kw_only=True, tag="image"):
    data: str
    format: str
    expected_tokens: int | None = None


class ImageAssetPointer(_Wire, frozen=True, kw_only=True, tag="image_asset_pointer"):
    location: str
    format: str
    expected_tokens: int | None = None


class Dmel(_Wire, frozen=True, kw_only=True, tag="dmel"):
    dmel: str


class Prompt(_Wire, frozen=True, kw_only=True):
    chunks: list[EncodedText | Image | ImageAssetPointer | Dmel]


class SamplingParams(_Wire, frozen=True, kw_only=True):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class TargetTokens(_Wire, frozen=True, kw_only=True):
    data: list[int]
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Sample(_Wire, frozen=True, kw_only=True):
    sampling_session_id: str
    seq_id: int
    prompt: Prompt
    sampling_params: SamplingParams = SamplingParams()
    num_samples: int = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TargetTokens | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["sample"] = "sample"


class RetrieveFuture(_Wire, frozen=True, kw_only=True):
    request_id: str
    model_id: str | None = None
    allow_metadata_only: bool = False


class WeightsInfo(_Wire, frozen=True, kw_only=True):
    tinker_path: str


class CopyWeights(_Wire, frozen=True, kw_only=True):
    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class SetTtl(_Wire, frozen=True, kw_only=True):
    """``ttl_seconds`` is sent even when it is null."""

    ttl_seconds: int | None


class AssignProject(_Wire, frozen=True, kw_only=True):
    project_id: str


class OwnSessions(_Wire, frozen=True, kw_only=True, tag="own"):
    pass


class AccessibleSessions(_Wire, frozen=True, kw_only=True, tag="accessible"):
    pass


class SessionsOf(_Wire, frozen=True, kw_only=True, tag="user"):
    owner_urns: list[str]


Owner = OwnSessions | AccessibleSessions | SessionsOf


class ActiveSessions(_Wire, frozen=True, kw_only=True, tag="active"):
    pass


class CancelledSessions(_Wire, frozen=True, kw_only=True, tag="cancelled"):
    pass


class FailedSessions(_Wire, frozen=True, kw_only=True, tag="failed"):
    pass


class FinishedSessions(_Wire, frozen=True, kw_only=True, tag="client_finished"):
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursor(_Wire, frozen=True, kw_only=True):
    last_created_at: datetime
    last_session_id: str


class SearchSessions(_Wire, frozen=True, kw_only=True):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: Owner = OwnSessions()
    statuses: list[ActiveSessions | CancelledSessions | FailedSessions | FinishedSessions] | None = None
    limit: int = 50
    cursor: SearchCursor | None = None


class CheckpointCursor(_Wire, frozen=True, kw_only=True):
    last_created_at: datetime
    last_checkpoint_id: str


class SearchCheckpoints(_Wire, frozen=True, kw_only=True):
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    checkpoint_type: Literal["training", "sampler", "external"] | None = None
    owner: Owner = OwnSessions()
    base_models: list[str] | None = None
    limit: int = 50
    cursor: CheckpointCursor | None = None
