"""Requests as OpenAI clients send them, with the extra fields of vLLM. Unknown fields are refused.

Fields typed :data:`Unserved` are known to the clients and refused with a value that asks for something; see
``_NEUTRAL`` in ``params``.
"""

from typing import Any, Literal

import msgspec

from selfloop.server.shared.sampling import PenaltyFields, StructuredOutputs
from selfloop.server.shared.schemas import Schemas

SCHEMAS = Schemas("OpenAI")
"""The structs of this dialect that the OpenAPI document shows."""

Unserved = Any
Label = dict[str, Any] | None
"""Taken, and changes nothing."""


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all request structs."""


class StreamOptions(_Wire, frozen=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingBody(PenaltyFields, frozen=True, kw_only=True):
    """Fields of both routes; null is as good as absent."""

    model: str
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Unserved = None
    add_special_tokens: bool = True


class TextPart(_Wire, frozen=True, kw_only=True):
    type: Literal["text"]
    text: str
    cache_control: Label = None


class ImageUrl(_Wire, frozen=True, kw_only=True):
    url: str
    detail: Unserved = None


class ImagePart(_Wire, frozen=True, kw_only=True):
    type: Literal["image_url"]
    image_url: ImageUrl
    cache_control: Label = None
    prompt_cache_breakpoint: Label = None


class FunctionCall(_Wire, frozen=True, kw_only=True):
    name: str
    arguments: str


class ToolCall(_Wire, frozen=True, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(_Wire, frozen=True, kw_only=True):
    """One message of any role; what a role may carry is checked in ``chat``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    cache_control: Label = None
    refusal: Unserved = None
    audio: Unserved = None
    function_call: Unserved = None
    annotations: Unserved = None
    reasoning_content: Unserved = None


class FunctionTool(_Wire, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Label = None


class Tool(_Wire, frozen=True, kw_only=True):
    type: str
    function: FunctionTool | None = None
    custom: Unserved = None
    cache_control: Label = None


class NamedFunction(_Wire, frozen=True, kw_only=True):
    name: str


class NamedTool(_Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Wire, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(_Wire, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Unserved = None
    service_tier: Unserved = None
    modalities: Unserved = None
    audio: Unserved = None
    function_call: Unserved = None
    functions: Unserved = None
    moderation: Unserved = None
    prediction: Unserved = None
    prompt_cache_options: Unserved = None
    prompt_cache_retention: Unserved = None
    reasoning_effort: str | None = None
    verbosity: Unserved = None
    web_search_options: Unserved = None


class TokenizeBody(_Wire, frozen=True, kw_only=True):
    """vLLM's: a prompt, or messages as the chat template makes a prompt of them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None
    chat_template: Unserved = None
    mm_processor_kwargs: Unserved = None


class DetokenizeBody(_Wire, frozen=True, kw_only=True):
    tokens: list[int]
    model: str | None = None


class Error(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every error of these routes."""

    error: Error
