"""Requests of the Responses API; see ``wire`` for the types that are shared with the other routes.

Items and tools are decoded one by one in ``responses``, by their types.
"""

from typing import Any, Literal

import msgspec

from selfloop.server.openai.wire import Label, Unserved

Status = Literal["in_progress", "completed", "incomplete"] | None


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all request structs."""


class TextPart(_Wire, frozen=True, kw_only=True):
    """What is said, or was answered; the labels are of an answer that comes back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: Label = None


class ImagePart(_Wire, frozen=True, kw_only=True):
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: Unserved = None
    detail: Unserved = None
    prompt_cache_breakpoint: Label = None


class MessageItem(_Wire, frozen=True, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"
    id: str | None = None
    status: Status = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(_Wire, frozen=True, kw_only=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status = None
    caller: Unserved = None
    namespace: Unserved = None


class FunctionCallOutputItem(_Wire, frozen=True, kw_only=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    name: str | None = None
    status: Status = None
    caller: Unserved = None
    namespace: Unserved = None


class FunctionTool(_Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Unserved = None
    defer_loading: Unserved = None
    output_schema: Unserved = None


class ResponsesNamedTool(_Wire, frozen=True, kw_only=True):
    type: Literal["function"]
    name: str


class TextFormat(_Wire, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(_Wire, frozen=True, kw_only=True):
    format: TextFormat | None = None
    verbosity: Unserved = None


class Reasoning(_Wire, frozen=True, kw_only=True):
    effort: str | None = None
    summary: Unserved = None
    generate_summary: Unserved = None
    context: Unserved = None
    mode: Unserved = None


class ResponsesStreamOptions(_Wire, frozen=True, kw_only=True):
    include_obfuscation: Unserved = None


class ResponsesBody(_Wire, frozen=True, kw_only=True):
    """Null is as good as absent."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    access_programs: Unserved = None
    background: Unserved = None
    background_options: Unserved = None
    context_management: Unserved = None
    conversation: Unserved = None
    image: Unserved = None
    max_tool_calls: Unserved = None
    moderation: Unserved = None
    previous_response_id: Unserved = None
    prompt: Unserved = None
    prompt_cache_options: Unserved = None
    prompt_cache_retention: Unserved = None
    service_tier: Unserved = None
    store: Unserved = None
    top_logprobs: Unserved = None
    truncation: Unserved = None
