"""Requests of the Loops client as they come, and answers as it reads them. Unknown fields are refused."""

from typing import Any, Literal

import msgspec

from selfloop.server.shared.sampling import PenaltyFields, StructuredOutputs
from selfloop.server.shared.schemas import Schemas

SCHEMAS = Schemas()
"""The structs of this dialect that the OpenAPI document shows."""

Number = int | float | None


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all request structs."""


class EncodedText(_Wire, frozen=True, tag="encoded_text"):
    tokens: list[int]


class Image(_Wire, frozen=True, tag="image"):
    data: str
    format: str
    expected_tokens: int


class ModelInput(_Wire, frozen=True):
    chunks: list[EncodedText | Image]


class TensorData(_Wire, frozen=True):
    data: list[Number | list[Number]]
    dtype: str
    shape: list[int]


class PromptSpan(_Wire, frozen=True, tag="prompt_tokens"):
    sequence_id: str
    length: int
    offset: int = 0


class SampledSpan(_Wire, frozen=True, tag="sampled_tokens"):
    sequence_id: str
    length: int
    offset: int = 0


class ExternalRef(_Wire, frozen=True):
    """The client's word for what an answer's ``routed_experts_ref`` is."""

    uri: str
    version: int


class Datum(_Wire, frozen=True):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = {}
    routed_experts_ref: ExternalRef | None = None
    model_input_spans: list[PromptSpan | SampledSpan] | None = None
    loss_fn_input_spans: list[PromptSpan | SampledSpan] | None = None


class RunBody(_Wire, frozen=True, kw_only=True):
    """Fields that every operation carries."""

    model: str | None = None
    run_id: str | None = None
    seq_id: int | None = None


class InitTrainerBody(RunBody, frozen=True, kw_only=True):
    lora_rank: int
    base_model: str | None = None


class ForwardBody(RunBody, frozen=True, kw_only=True):
    data: list[Datum]
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, float | bool] | None = None
    top_k_logprobs: int = 0


class AdamBody(_Wire, frozen=True):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0


class OptimStepBody(RunBody, frozen=True, kw_only=True):
    adam_params: AdamBody = AdamBody()


class SaveStateBody(RunBody, frozen=True, kw_only=True):
    name: str
    ttl_seconds: int | None = None


class SaveWeightsBody(RunBody, frozen=True, kw_only=True):
    name: str
    ttl_seconds: int | None = None
    bump_version: bool = True


class LoadStateBody(RunBody, frozen=True, kw_only=True):
    path: str


class SampleBody(PenaltyFields, frozen=True, kw_only=True):
    prompt: list[int]
    max_tokens: int | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    model: str | None = None
    lora: str | None = None
    structured_outputs: StructuredOutputs | None = None
    model_input_chunks: list[EncodedText | Image] | None = None
    include_routed_experts: bool | None = None
    record_stability_info: bool | None = None


class Acceptance(msgspec.Struct, frozen=True):
    operation_id: str
    schema_version: Literal[1] = 1


class OutcomeAnswer(msgspec.Struct, frozen=True):
    """What became of an operation: ``result`` with ``done``, ``error`` and ``error_class`` with ``error``."""

    status: Literal["done", "error"]
    result: dict[str, Any] | None = None
    error: str | None = None
    error_class: str | None = None


OUTCOME = SCHEMAS.json_answer(OutcomeAnswer, "Done, or failed")
"""What the document says of a poll's answer."""
