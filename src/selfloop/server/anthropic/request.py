"""A request of messages: its conversation for the template, and what it asks of the sampler."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfloop.control.sampling.chats import Chat
from selfloop.control.sampling.service import SampleSpec
from selfloop.server.anthropic import wire
from selfloop.server.anthropic.turns import Turns
from selfloop.server.anthropic.unserved import block, refuse_unserved, shown_type, texts
from selfloop.server.shared import tools
from selfloop.server.shared.decode import to_json
from selfloop.server.shared.images import ImageReader
from selfloop.server.shared.sampling import check_ranges, json_schema, room_for
from selfloop.server.shared.tools import Choice, Function, ToolUse, has_variable, template_tool
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image
from selfloop.types.sampling import SamplingParams, StructuredOutput
from selfloop.types.vision import TEXT_ONLY, TextOnly, VisionFacts

# Conversations here have no thinking blocks, so there is nothing to clear; every other edit would change the prompt.
_NO_EDIT = "clear_thinking_20251015"
# What is meant where nothing is said.
_DEFAULT_EFFORT = "high"
_FORCING = "none, any or tool"
_RENDERED = re.compile(r"messages\[(\d+)\]\.")


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


def prompt_of(body: wire.PromptBody, template: str | None, vision: VisionFacts | TextOnly = TEXT_ONLY) -> Prompt:
    """For a model with this chat template, and with these eyes.

    Raises :class:`BadRequest` for any field that cannot be obeyed.
    """
    refuse_unserved(body)
    _check_context(body.context_management)
    given = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or [])]
    answer, answer_field = _answer_format(body)
    use = _tool_use(body.tool_choice, given, template, answer, answer_field)
    turns = Turns(ImageReader(vision))
    system = texts(body.system, "system")
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
        images=turns.images,
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
            raise BadRequest(f"{where}.type", f"{expected}; got {shown_type(edit)}")
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
        refuse_unserved(config, "output_config.")
        if has_variable(template, "reasoning_effort"):
            options |= {} if config.effort is None else {"reasoning_effort": config.effort}
        elif config.effort not in (None, _DEFAULT_EFFORT):
            expected = f"null or {_DEFAULT_EFFORT}: the model's chat template has no reasoning_effort"
            raise BadRequest("output_config.effort", f"{expected}, got {config.effort}")
    if thinking is not None:
        if thinking.type == "enabled":
            expected = "disabled, or adaptive, which leaves it to the model: no thinking is separated from the answer"
            raise BadRequest("thinking.type", f"{expected}, got enabled")
        refuse_unserved(thinking, "thinking.")
        if thinking.type == "disabled" and has_variable(template, "enable_thinking"):
            options["enable_thinking"] = False
    return options


def spec_of(
    body: wire.MessagesBody, tokens: list[int], prompt: Prompt, max_seq_len: int, images: Sequence[Image] = ()
) -> SampleSpec:
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
    return SampleSpec(tokens, 1, params, images=list(images))


def _tool(given: dict[str, Any], where: str) -> wire.Tool:
    if given.get("type") not in (None, "custom"):
        raise BadRequest(f"{where}.type", f"custom: tools that a server runs are not served, got {shown_type(given)}")
    return block(given, wire.Tool, where)


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
