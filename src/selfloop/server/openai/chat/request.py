"""A chat request: its conversation for the template, and what it asks of the sampler."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from selfloop.control.sampling.chats import Chat
from selfloop.server.openai import wire
from selfloop.server.openai.chat.tools import tool_use
from selfloop.server.openai.params import Asked, asked, exactly_one_structure, refuse_unserved
from selfloop.server.shared.chat_content import Content, with_image, with_text
from selfloop.server.shared.decode import convert, to_json
from selfloop.server.shared.images import ImageReader
from selfloop.server.shared.sampling import MAX_TOP_LOGPROBS, json_schema, within
from selfloop.server.shared.tools import ToolUse, has_variable, template_call, template_tool
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image
from selfloop.types.vision import TEXT_ONLY, TextOnly, VisionFacts

# These the server sets itself.
_OWN_VARIABLES = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "chat_template"}
)


_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked chat request.

    Args:
        top_logprobs: None when no logprobs are asked for.
        max_tokens: None for all the room that is left, given as the field ``max_tokens_field``.
    """

    chat: Chat
    asked: Asked
    tools: ToolUse
    top_logprobs: int | None
    max_tokens: int | None
    max_tokens_field: str


def chat_request(body: wire.ChatBody, template: str | None, vision: VisionFacts | TextOnly = TEXT_ONLY) -> ChatRequest:
    """For a model with this chat template, and with these eyes.

    Raises :class:`BadRequest` for any field that cannot be obeyed.
    """
    wanted = asked(body)
    answer = _answer_schema(body.response_format)
    use = tool_use(body, template, answer)
    if use.form is not None and wanted.structured is not None:
        raise BadRequest("tool_choice", "none, required or a function when the text is constrained")
    formatted = None
    if answer is not None and use.form is None:
        formatted = json_schema(answer, "response_format.json_schema.schema")
    by_field = {wanted.structured_by or "structured_outputs": wanted.structured}
    by_tools = "tool_choice" if use.form is None else "tools"
    structured, by = exactly_one_structure(**by_field, response_format=formatted, **{by_tools: use.structured})
    stop = [*wanted.stop, *use.own_stop]
    return ChatRequest(
        _chat(body, template, ImageReader(vision)),
        replace(wanted, structured=structured, structured_by=by, stop=stop),
        use,
        _top_logprobs(body),
        *_max_tokens(body),
    )


def _max_tokens(body: wire.ChatBody) -> tuple[int | None, str]:
    if body.max_completion_tokens is None:
        return body.max_tokens, "max_tokens"
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise BadRequest("max_tokens", f"null, or max_completion_tokens = {body.max_completion_tokens}")
    return body.max_completion_tokens, "max_completion_tokens"


def _top_logprobs(body: wire.ChatBody) -> int | None:
    if not body.logprobs:
        if body.top_logprobs not in (None, 0):
            raise BadRequest("top_logprobs", "null unless logprobs is true")
        return None
    top = 0 if body.top_logprobs is None else body.top_logprobs
    within("top_logprobs", top, 0, MAX_TOP_LOGPROBS)
    return top


def _answer_schema(given: wire.ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema of the answer; None for any text. One that is not strict may be obeyed strictly."""
    if given is None:
        return None
    if (given.type == "json_schema") is not (given.json_schema is not None):
        raise BadRequest("response_format.json_schema", "an object with type json_schema, null with any other")
    if given.json_schema is not None:
        return given.json_schema.schema or {}
    return {"type": "object"} if given.type == "json_object" else None


def _chat(body: wire.ChatBody, template: str | None, reader: ImageReader) -> Chat:
    if not body.messages:
        raise BadRequest("messages", "at least one message")
    images: list[Image] = []
    messages = [_message(message, f"messages[{i}]", reader, images) for i, message in enumerate(body.messages)]
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise BadRequest("continue_final_message", "false or null when add_generation_prompt is true")
    if goes_on and not messages[-1]["content"]:
        raise BadRequest("continue_final_message", "false or null: the last message has no text to go on with")
    options = dict(body.chat_template_kwargs or {})
    for name in options:
        if name in _OWN_VARIABLES:
            raise BadRequest(f"chat_template_kwargs.{name}", "the request's own field, or nothing")
        if template is None or name not in template:
            raise BadRequest(f"chat_template_kwargs.{name}", "a variable of the model's chat template")
    if body.reasoning_effort is not None:
        _check_effort(body.reasoning_effort, template, options)
        options["reasoning_effort"] = body.reasoning_effort
    tools = None
    if body.tools and body.tool_choice != "none":
        tools = to_json([_tool(tool) for tool in body.tools], "tools")
    return Chat(
        messages=to_json(messages, "messages"),
        tools=tools,
        add_generation_prompt=not goes_on if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=goes_on,
        options=to_json(options, "chat_template_kwargs") if options else None,
        images=images,
    )


def _check_effort(effort: str, template: str | None, options: dict[str, Any]) -> None:
    if effort not in _EFFORTS:
        raise BadRequest("reasoning_effort", f"one of {', '.join(_EFFORTS)}; got {effort[:100]!r}")
    if not has_variable(template, "reasoning_effort"):
        raise BadRequest(
            "reasoning_effort",
            "null: the model's chat template has no such variable; chat_template_kwargs takes those that it has",
        )
    if "reasoning_effort" in options:
        raise BadRequest("reasoning_effort", "null when chat_template_kwargs.reasoning_effort is given")


def _tool(tool: wire.Tool) -> dict[str, object]:
    assert tool.function is not None
    return template_tool(tool.function.name, tool.function.description, tool.function.parameters)


def _message(message: wire.Message, where: str, reader: ImageReader, images: list[Image]) -> dict[str, Any]:
    """As templates read it: text as one string or beside images, a call's arguments as an object."""
    refuse_unserved(message, f"{where}.")
    # Templates know no developer; it is who speaks as system here.
    role = "system" if message.role == "developer" else message.role
    content = _content(message.content, f"{where}.content", reader, images)
    rendered: dict[str, Any] = {"role": role, "content": content or ""}
    if message.tool_calls:
        if role != "assistant":
            raise BadRequest(f"{where}.tool_calls", "null unless the role is assistant")
        rendered["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}].function") for i, call in enumerate(message.tool_calls)
        ]
    elif content is None:
        raise BadRequest(f"{where}.content", "a string, or a list of parts")
    if role == "tool":
        if message.tool_call_id is None:
            raise BadRequest(f"{where}.tool_call_id", "the id of the call that this message answers")
        rendered["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            rendered["name"] = message.name
    elif message.tool_call_id is not None:
        raise BadRequest(f"{where}.tool_call_id", "null unless the role is tool")
    return rendered


def _call(call: wire.ToolCall, where: str) -> dict[str, object]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise BadRequest(f"{where}.arguments", "a JSON object as a string") from None
    return template_call(call.id, call.function.name, arguments)


def _content(
    given: str | list[dict[str, Any]] | None, where: str, reader: ImageReader, images: list[Image]
) -> Content | None:
    """What templates read; its images are added to ``images``."""
    if given is None or isinstance(given, str):
        return given
    content: Content | None = "" if not given else None
    for i, part in enumerate(given):
        match part.get("type"):
            case "text":
                content = with_text(content, convert(part, wire.TextPart, f"{where}[{i}]").text)
            case "image_url":
                reader.check_seen(f"{where}[{i}]", "a part of type text")
                images.append(_image(convert(part, wire.ImagePart, f"{where}[{i}]"), f"{where}[{i}]", reader))
                content = with_image(content)
            case kind:
                expected = f"a part of type {reader.kinds('text', 'image_url')}"
                raise BadRequest(f"{where}[{i}]", f"{expected}, got {_shown(kind)}")
    return content


def _image(part: wire.ImagePart, where: str, reader: ImageReader) -> Image:
    refuse_unserved(part.image_url, f"{where}.image_url.")
    return reader.from_data_url(part.image_url.url, f"{where}.image_url.url")


def _shown(kind: object) -> str:
    return msgspec.json.encode(kind).decode()[:100]
