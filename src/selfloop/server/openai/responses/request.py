"""A request of the Responses API as a chat request: nothing is kept here, so each brings its whole input."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from selfloop.server.openai import wire as chat_wire
from selfloop.server.openai.params import refuse_unserved
from selfloop.server.openai.responses import wire
from selfloop.server.shared.decode import convert, to_json
from selfloop.types.errors import BadRequest

# The fields of a chat request by the names that they have here.
_NAMES = (
    (re.compile(r"^max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format\.json_schema(?=$|\.)"), "text.format"),
    (re.compile(r"^response_format(?=$|\.)"), "text.format"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\]|tool_choice)\.function(?=$|\.)"), r"\1"),
)
# An object with a URL there, and the URL itself here.
_IMAGE_URL = re.compile(r"(?<=\.image_url)\.url$")
_MESSAGE = re.compile(r"^messages\[(\d+)\](?:\.tool_calls\[(\d+)\]\.function)?(.*)$", re.DOTALL)


@dataclass(slots=True)
class Conversation:
    """Items as messages, and where each message and each call came from."""

    messages: list[chat_wire.Message] = field(default_factory=list[chat_wire.Message])
    _places: list[str] = field(default_factory=list[str])
    _calls: dict[tuple[int, int], str] = field(default_factory=dict[tuple[int, int], str])

    def add(self, message: chat_wire.Message, where: str) -> None:
        self.messages.append(message)
        self._places.append(where)

    def add_call(self, item: wire.FunctionCallItem, where: str) -> None:
        """A call belongs to the assistant's message before it, as do the calls beside it."""
        function = chat_wire.FunctionCall(name=item.name, arguments=item.arguments)
        call = chat_wire.ToolCall(id=item.call_id, function=function)
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != "assistant":
            self.add(chat_wire.Message(role="assistant", tool_calls=[call]), where)
            before: list[chat_wire.ToolCall] = []
        else:
            before = last.tool_calls or []
            self.messages[-1] = chat_wire.Message(role="assistant", content=last.content, tool_calls=[*before, call])
        self._calls[len(self.messages) - 1, len(before)] = where

    def field_of(self, chat_field: str) -> str:
        """The name that a field of the chat request has in this one."""
        if (found := _MESSAGE.match(chat_field)) is not None:
            message = int(found[1])
            place = self._places[message] if found[2] is None else self._calls[message, int(found[2])]
            # Texts of their own, and not items with a content.
            if place in ("input", "instructions"):
                return place
            within = _IMAGE_URL.sub("", found[3])
            if self.messages[message].role == "tool":
                within = within.replace(".content", ".output", 1)
            return place + within
        if chat_field == "messages":
            return "input"
        for pattern, name in _NAMES:
            chat_field = pattern.sub(name, chat_field)
        return chat_field

    @contextmanager
    def named(self) -> Generator[None]:
        """What is refused within is refused by the names of this API."""
        try:
            yield
        except BadRequest as error:
            raise BadRequest(self.field_of(error.field), error.expected, reason=error.reason) from None


def chat_of(body: wire.ResponsesBody) -> tuple[chat_wire.ChatBody, Conversation]:
    """Raises :class:`BadRequest` for what is not served."""
    refuse_unserved(body)
    for name in ("text", "reasoning", "stream_options"):
        inner = getattr(body, name)
        if inner is not None:
            refuse_unserved(inner, f"{name}.")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options", "null unless stream is true")
    conversation = Conversation()
    if body.instructions:
        conversation.add(chat_wire.Message(role="system", content=body.instructions), "instructions")
    if isinstance(body.input, str):
        conversation.add(chat_wire.Message(role="user", content=body.input), "input")
    else:
        if not body.input:
            raise BadRequest("input", "a string, or at least one item")
        for i, item in enumerate(body.input):
            _take(conversation, item, f"input[{i}]")
    choice = body.tool_choice
    if isinstance(choice, wire.ResponsesNamedTool):
        choice = chat_wire.NamedTool(type="function", function=chat_wire.NamedFunction(name=choice.name))
    chat = chat_wire.ChatBody(
        model=body.model,
        messages=conversation.messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        tools=None if body.tools is None else [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)],
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(None if body.text is None else body.text.format),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        stream=body.stream,
    )
    return chat, conversation


def _take(conversation: Conversation, item: dict[str, Any], where: str) -> None:
    match item.get("type", "message"):
        case "message":
            message = convert(item, wire.MessageItem, where)
            content = _content(message.content, f"{where}.content")
            conversation.add(chat_wire.Message(role=message.role, content=content), where)
        case "function_call":
            call = convert(item, wire.FunctionCallItem, where)
            refuse_unserved(call, f"{where}.")
            conversation.add_call(call, where)
        case "function_call_output":
            output = convert(item, wire.FunctionCallOutputItem, where)
            refuse_unserved(output, f"{where}.")
            content = _content(output.output, f"{where}.output")
            named = chat_wire.Message(role="tool", content=content, tool_call_id=output.call_id, name=output.name)
            conversation.add(named, where)
        case kind:
            expected = "message, function_call or function_call_output: nothing is kept here that an item could mean"
            raise BadRequest(f"{where}.type", f"{expected}, got {to_json(kind, where).decode()[:100]}")


def _content(given: str | list[dict[str, Any]], where: str) -> str | list[dict[str, Any]]:
    """Parts as those of a chat, each in its place; what a model does not see is refused there."""
    return given if isinstance(given, str) else [_part(part, f"{where}[{i}]") for i, part in enumerate(given)]


def _part(given: dict[str, Any], where: str) -> dict[str, Any]:
    match given.get("type"):
        case "input_text" | "output_text":
            return {"type": "text", "text": convert(given, wire.TextPart, where).text}
        case "input_image":
            image = convert(given, wire.ImagePart, where)
            refuse_unserved(image, f"{where}.")
            return {"type": "image_url", "image_url": {"url": image.image_url or ""}}
        case kind:
            expected = "a part of type input_text, output_text, or input_image where the model sees images"
            raise BadRequest(where, f"{expected}; got {to_json(kind, where).decode()[:100]}")


def _tool(given: dict[str, Any], where: str) -> chat_wire.Tool:
    if given.get("type") != "function":
        kind = to_json(given.get("type"), where).decode()[:100]
        raise BadRequest(f"{where}.type", f"function: tools that a server runs are not served, got {kind}")
    tool = convert(given, wire.FunctionTool, where)
    refuse_unserved(tool, f"{where}.")
    function = chat_wire.FunctionTool(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return chat_wire.Tool(type="function", function=function)


def _format(given: wire.TextFormat | None) -> chat_wire.ResponseFormat | None:
    if given is None:
        return None
    if given.type != "json_schema":
        if given.schema is not None:
            raise BadRequest("text.format.schema", "null unless the type is json_schema")
        return chat_wire.ResponseFormat(type=given.type)
    if given.schema is None or given.name is None:
        raise BadRequest("text.format." + ("name" if given.name is None else "schema"), "required by json_schema")
    schema = chat_wire.JsonSchema(name=given.name, schema=given.schema, strict=given.strict)
    return chat_wire.ResponseFormat(type="json_schema", json_schema=schema)
