"""Requests as Anthropic clients send them. Unknown fields are refused.

Fields typed :data:`Unserved` are known to the clients and refused with a value that asks for something; see
``_NEUTRAL`` in ``request``. :data:`Label` is taken and changes nothing.
"""

from typing import Any, Literal

import msgspec

from selfloop.server.shared.schemas import Schemas

SCHEMAS = Schemas("Anthropic")
"""The structs of this dialect that the OpenAPI document shows."""

Unserved = Any
Label = dict[str, Any] | None


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all request structs."""


class TextBlock(_Wire, frozen=True, kw_only=True):
    type: Literal["text"]
    text: str
    cache_control: Label = None
    citations: Unserved = None


class Base64Source(_Wire, frozen=True, kw_only=True):
    type: Literal["base64"]
    media_type: str
    data: str


class ImageBlock(_Wire, frozen=True, kw_only=True):
    """Sources are decoded by their types, as only base64 is served."""

    type: Literal["image"]
    source: dict[str, Any]
    cache_control: Label = None
    transformations: Unserved = None


class ToolUseBlock(_Wire, frozen=True, kw_only=True):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Label = None
    caller: Unserved = None
    toolset_name: Unserved = None


class ToolResultBlock(_Wire, frozen=True, kw_only=True):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool | None = None
    cache_control: Label = None
    toolset_name: Unserved = None


class Message(_Wire, frozen=True, kw_only=True):
    """One message; blocks are decoded one by one, each by its type."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]
    cache_control: Label = None


class Format(_Wire, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(_Wire, frozen=True, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None
    task_budget: Unserved = None


class Thinking(_Wire, frozen=True, kw_only=True):
    """What is said of a kind is checked by ``request``: only those that ask for no thinking blocks are served."""

    type: Literal["disabled", "adaptive", "enabled"]
    display: Literal["summarized", "omitted"] | None = None
    budget_tokens: Unserved = None


class ContextManagement(_Wire, frozen=True, kw_only=True):
    """Edits are looked at one by one, by their types."""

    edits: list[dict[str, Any]] = []


class Tool(_Wire, frozen=True, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: Label = None
    allowed_callers: Unserved = None
    defer_loading: Unserved = None
    eager_input_streaming: Unserved = None
    input_examples: Unserved = None


class ToolChoice(_Wire, frozen=True, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(_Wire, frozen=True, kw_only=True):
    user_id: str | None = None


class PromptBody(_Wire, frozen=True, kw_only=True):
    """What makes the prompt; null is as good as absent. Tools are decoded one by one, as servers' own are refused."""

    model: str
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    cache_control: Label = None
    context_management: ContextManagement | None = None
    mcp_servers: Unserved = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None
    speed: Unserved = None
    thinking: Thinking | None = None
    user_profile_id: Unserved = None
    workspace_id: Unserved = None


class MessagesBody(PromptBody, frozen=True, kw_only=True):
    max_tokens: int
    metadata: Metadata | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    betas: Unserved = None
    container: Unserved = None
    diagnostics: Unserved = None
    inference_geo: Unserved = None
    service_tier: Unserved = None


class ErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str


class Failure(msgspec.Struct, frozen=True):
    """Every error of these routes."""

    error: ErrorDetail
    type: Literal["error"] = "error"
