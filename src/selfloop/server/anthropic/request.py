"""A request of messages: its conversation for the template, and what it asks of the sampler."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from selfloop.control.sampling.service import Chat, SampleSpec
from selfloop.server.anthropic import wire
from selfloop.server.shared import tools
from selfloop.server.shared.decode import convert, to_json
from selfloop.server.shared.sampling import check_ranges, json_schema, room_for
from selfloop.server.shared.tools import Choice, Function, ToolUse, has_variable, template_call, template_tool
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import SamplingParams, StructuredOutput

S = TypeVar("S", bound=msgspec.Struct)

# What asks for nothing, beside null: the defaults that some clients always send.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "allowed_callers": (["direct"],),
    "caller": ({"type": "direct"},),
    "citations": ([],),
    "defer_loading": (False,),
    "eager_input_streaming": (False,),
    "input_examples": ([],),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
}
# Conversations here have no thinking blocks, so there is nothing to clear; every other edit would change the prompt.
_NO_EDIT = "clear_thinking_20251015"
# What is meant where nothing is said.
_DEFAULT_EFFORT = "high"
_FORCING = "none, any or tool"
_RENDERED = re.compile(r"messages\[(\d+)\]\.")
_TOOL_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked conversation, the tools that its answer may use, and what the answer must match.

    ``structured_by`` is the field that ``structured`` came of, ``places`` the fields that each of the chat's messages
    came of.
    """

    chat: Chat
    tools: ToolUse
    structured: StructuredOutput | None
    structured_by: str
    places: list[list[str]]

    def as_asked(self, error: BadRequest) -> BadRequest:
        """What the chat template's worker refused, under the name of the field that was sent."""
        found = _RENDERED.match(error.field)
        return BadRequest(" or ".join(self.places[int(found[1])]), error.expected) if found else error


def prompt_of(body: wire.PromptBody, template: str | None) -> Prompt:
    """Raises :class:`BadRequest` for any field that cannot be obeyed."""
    _refuse_unserved(body)
    _check_context(body.context_management)
    given = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or [])]
    answer, answer_field = _answer_format(body)
    use = _tool_use(body.tool_choice, given, template, answer, answer_field)
    turns = _Turns()
    system = _texts(body.system, "system")
    if system:
        turns.add({"role": "system", "content": "\n".join(system)}, "system")
    if not body.messages:
        raise BadRequest("messages", "at least one message")
    for i, message in enumerate(body.messages):
        turns.take(message, f"messages[{i}]")
    last = turns.messages[-1]
    goes_on = last["role"] == "assistant"
    if goes_on and ("tool_calls" in last or not last["content"]):
        raise BadRequest("messages", "a tool_result for each tool_use, or text to go on with, in the last message")
    shown = given if use.names else []
    specs = [template_tool(tool.name, tool.description, tool.input_schema) for tool in shown]
    chat = Chat(
        messages=to_json(turns.messages, "messages"),
        tools=to_json(specs, "tools") if specs else None,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        options=to_json(options, "output_config") if (options := _template_options(body, template)) else None,
    )
    if answer is None or use.form is not None:
        return Prompt(chat, use, use.structured, "tools", turns.places)
    if use.structured is not None:
        raise BadRequest(answer_field, "null when tool_choice forces a call: a call does not match it")
    return Prompt(chat, use, json_schema(answer, answer_field), answer_field, turns.places)


def _check_context(given: wire.ContextManagement | None) -> None:
    for i, edit in enumerate([] if given is None else given.edits):
        where = f"context_management.edits[{i}]"
        if edit.get("type") != _NO_EDIT:
            expected = f"{_NO_EDIT}, the one edit that leaves a prompt here as it is"
            raise BadRequest(f"{where}.type", f"{expected}; got {_shown(edit)}")
        if unknown := edit.keys() - {"type", "keep"}:
            raise BadRequest(f"{where}.{min(unknown)[:100]}", "unknown field")


def _answer_format(body: wire.PromptBody) -> tuple[dict[str, Any] | None, str]:
    """The JSON schema of the answer, and the field that gives it."""
    config = None if body.output_config is None else body.output_config.format
    if config is not None and body.output_format is not None:
        raise BadRequest("output_format", "null when output_config.format is given")
    field = "output_format" if config is None else "output_config.format"
    given = body.output_format if config is None else config
    return None if given is None else given.schema, f"{field}.schema"


def _template_options(body: wire.PromptBody, template: str | None) -> dict[str, object]:
    """Effort and thinking as variables of the chat template, where it has them."""
    options: dict[str, object] = {}
    config, thinking = body.output_config, body.thinking
    if config is not None:
        _refuse_unserved(config, "output_config.")
        if has_variable(template, "reasoning_effort"):
            options |= {} if config.effort is None else {"reasoning_effort": config.effort}
        elif config.effort not in (None, _DEFAULT_EFFORT):
            expected = f"null or {_DEFAULT_EFFORT}: the model's chat template has no reasoning_effort"
            raise BadRequest("output_config.effort", f"{expected}, got {config.effort}")
    if thinking is not None:
        if thinking.type == "enabled":
            expected = "disabled, or adaptive, which leaves it to the model: no thinking is separated from the answer"
            raise BadRequest("thinking.type", f"{expected}, got enabled")
        _refuse_unserved(thinking, "thinking.")
        if thinking.type == "disabled" and has_variable(template, "enable_thinking"):
            options["enable_thinking"] = False
    return options


def spec_of(body: wire.MessagesBody, tokens: list[int], prompt: Prompt, max_seq_len: int) -> SampleSpec:
    """What to sample after the rendered prompt: ``max_tokens``, or fewer where the model's length ends before.

    Raises:
        BadRequest: a parameter outside its range, or no room after the prompt.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    top_k = 0 if body.top_k is None else body.top_k
    check_ranges(temperature, top_p, top_k, None)
    if body.max_tokens < 1:
        raise BadRequest("max_tokens", f"a number >= 1, got {body.max_tokens}")
    stop = body.stop_sequences or []
    if "" in stop:
        raise BadRequest("stop_sequences", "strings of at least one character")
    params = SamplingParams(
        max_tokens=min(body.max_tokens, room_for(tokens, "messages", max_seq_len)),
        temperature=temperature,
        top_k=max(top_k, 0),
        top_p=top_p,
        stop=[*stop, *prompt.tools.own_stop],
        structured=prompt.structured,
    )
    return SampleSpec(tokens, 1, params)


def _refuse_unserved(body: msgspec.Struct, prefix: str = "") -> None:
    for given in msgspec.structs.fields(body):
        value: object = getattr(body, given.name)
        if given.type is wire.Unserved and value is not None and value not in _NEUTRAL.get(given.name, ()):
            neutral = [msgspec.json.encode(v).decode() for v in _NEUTRAL.get(given.name, ())]
            raise BadRequest(prefix + given.name, " or ".join(["null", *neutral]) + ": not served here")


def _block(given: dict[str, Any], kind: type[S], where: str) -> S:
    block = convert(given, kind, where)
    _refuse_unserved(block, f"{where}.")
    return block


def _tool(given: dict[str, Any], where: str) -> wire.Tool:
    if given.get("type") not in (None, "custom"):
        raise BadRequest(f"{where}.type", f"custom: tools that a server runs are not served, got {_shown(given)}")
    return _block(given, wire.Tool, where)


def _tool_use(
    choice: wire.ToolChoice | None,
    given: Sequence[wire.Tool],
    template: str | None,
    answer: dict[str, Any] | None,
    answer_field: str,
) -> ToolUse:
    if choice is not None and (choice.type == "tool") is not (choice.name is not None):
        raise BadRequest("tool_choice.name", "a tool's name with type tool, null with any other")
    if not given:
        if choice is not None and choice.type in ("any", "tool"):
            raise BadRequest("tool_choice", "null, auto or none without tools")
        return ToolUse()
    functions = [
        Function(tool.name, tool.input_schema, bool(tool.strict), f"tools[{i}]", "input_schema")
        for i, tool in enumerate(given)
    ]
    chosen = _choice(choice or wire.ToolChoice(type="auto"))
    return tools.tool_use(functions, chosen, template, answer, answer_field)


def _choice(choice: wire.ToolChoice) -> Choice:
    kind = "forced" if choice.type in ("any", "tool") else "none" if choice.type == "none" else "auto"
    return Choice(kind, choice.name, bool(choice.disable_parallel_tool_use), "tool_choice.name", _FORCING)


@dataclass(slots=True)
class _Turns:
    """The conversation as templates read it: text as one string, tools' answers as messages of their own."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    places: list[list[str]] = field(default_factory=list[list[str]])
    _called: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, message: dict[str, Any], where: str) -> None:
        self.messages.append(message)
        self.places.append([where])

    def take(self, message: wire.Message, where: str) -> None:
        if isinstance(message.content, str):
            self._text(message.role, message.content, f"{where}.content")
            return
        if not message.content:
            raise BadRequest(f"{where}.content", "a string, or at least one block")
        for i, given in enumerate(message.content):
            self._take_block(message.role, given, f"{where}.content[{i}]")

    def _take_block(self, role: str, given: dict[str, Any], where: str) -> None:
        match given.get("type"):
            case "text":
                self._text(role, _block(given, wire.TextBlock, where).text, where)
            case "tool_use" if role == "assistant":
                self._use(_block(given, wire.ToolUseBlock, where), where)
            case "tool_result" if role == "user":
                self._result(_block(given, wire.ToolResultBlock, where), where)
            case _:
                own = {"assistant": " or tool_use", "user": " or tool_result"}.get(role, "")
                expected = f"a block of type text{own}: the served models take text only"
                raise BadRequest(where, f"{expected}, got {_shown(given)}")

    def _text(self, role: str, text: str, where: str) -> None:
        """A turn's texts are one message, joined by line breaks; turns of one role that follow each other are one."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == role and "tool_calls" not in last:
            last["content"] += "\n" + text
            self.places[-1].append(where)
        else:
            self.add({"role": role, "content": text}, where)

    def _use(self, block: wire.ToolUseBlock, where: str) -> None:
        if not _TOOL_ID.fullmatch(block.id) or block.id in self._called:
            raise BadRequest(f"{where}.id", "1 to 128 letters, digits, _ or -, and no other call's")
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add({"role": "assistant", "content": ""}, where)
        else:
            self.places[-1].append(where)
        calls: list[object] = self.messages[-1].setdefault("tool_calls", [])
        calls.append(template_call(block.id, block.name, block.input))
        self._called[block.id] = block.name

    def _result(self, block: wire.ToolResultBlock, where: str) -> None:
        name = self._called.get(block.tool_use_id)
        if name is None:
            raise BadRequest(f"{where}.tool_use_id", "the id of a tool_use in a message before")
        text = "\n".join(_texts(block.content, f"{where}.content"))
        if block.is_error:
            # Templates have no such mark; the model is to see it all the same.
            text = f"Error: {text}"
        self.add({"role": "tool", "content": text, "tool_call_id": block.tool_use_id, "name": name}, where)


def _texts(content: str | list[dict[str, Any]] | None, where: str) -> list[str]:
    if content is None or isinstance(content, str):
        return [content] if content else []
    texts: list[str] = []
    for i, given in enumerate(content):
        if given.get("type") != "text":
            raise BadRequest(
                f"{where}[{i}]", f"a block of type text: the served models take text only, got {_shown(given)}"
            )
        texts.append(_block(given, wire.TextBlock, f"{where}[{i}]").text)
    return texts


def _shown(given: dict[str, Any]) -> str:
    return to_json(given.get("type"), "type").decode()[:100]
