"""Function tools: how a template writes a call, how one is forced, and how calls are read out of text."""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

from selfloop.server.shared.call_grammar import CLOSE, OPEN, Signature, calls_in_text, calls_or_json, one_call
from selfloop.server.shared.tagged_parameters import OPEN_FUNCTION, read_call, texts_of
from selfloop.types.errors import BadRequest
from selfloop.types.ids import new_id
from selfloop.types.sampling import StructuredOutput
from selfloop.types.tool_templates import template_with_tools

CallForm = Literal["tags", "parameters", "json"]
"""``tags``: ``<tool_call>{"name", "arguments"}</tool_call>`` anywhere in the text (Hermes, Qwen). ``parameters``: the
same, with a tag for each parameter in place of JSON (Qwen3.5). ``json``: the whole text is ``{"name", "parameters"}``
(Llama)."""

# A string may be cut off where the text ends.
_STRING_OR_CLOSE = re.compile(r'"(?:[^"\\]|\\.|\\\Z)*(?:"|\Z)|' + CLOSE, re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# A value may hold the tag that ends a call, but hardly both in a row.
_FUNCTION_CLOSE = re.compile(r"</function>\s*(?=" + CLOSE + ")")


def call_form(template: str) -> CallForm | None:
    """How the model behind a chat template writes calls, None when the template shows no form that is read here."""
    if OPEN in template:
        # A template that lists parameters by tag does not write JSON between its tags.
        return "parameters" if OPEN_FUNCTION in template else "tags"
    if re.search(r'\{\s*\\?"name\\?"\s*:\s*[^{}]{1,80}\\?"parameters\\?"\s*:', template):
        return "json"
    return None


class Call(NamedTuple):
    """A call of a function; ``arguments`` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called.

    Args:
        parameters: JSON schema of its arguments; None for any.
        strict: whether the caller relies on the schema being kept.
        where: the field that gives it, as its dialect writes it.
        schema_field: the field below ``where`` that gives the parameters.
    """

    name: str
    parameters: dict[str, Any] | None
    strict: bool
    where: str
    schema_field: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked of the functions.

    Args:
        kind: no call, calls where the text has them, or exactly one call.
        name: the function that must be called; None for any.
        at_most_one: the text ends with the first call.
        field: the field that names the function.
        forcing: the choices that are taken where the text is not read, in the dialect's words.
    """

    kind: Literal["none", "auto", "forced"]
    name: str | None
    at_most_one: bool
    field: str
    forcing: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the request says of tools.

    Args:
        names: the functions that may be called; empty when the answer is plain text.
        form: how calls are written in the text; None where it is one call and nothing else.
        structured: what keeps the calls in their functions' schemas.
        own_stop: what ends the text with its first call, where nothing else does.
        texts: functions and their parameters that are text, for calls that do not say what is.
    """

    names: frozenset[str] = frozenset()
    form: CallForm | None = None
    structured: StructuredOutput | None = None
    own_stop: tuple[str, ...] = ()
    texts: frozenset[tuple[str, str]] = frozenset()


def tool_use(
    functions: list[Function],
    choice: Choice,
    template: str | None,
    answer: dict[str, Any] | None = None,
    answer_field: str = "response_format",
) -> ToolUse:
    """The checked tools of a request, of which there is at least one.

    Args:
        answer: JSON schema of a text that is no call; None for any text. ``answer_field`` gives it.

    Raises:
        BadRequest: an unfit name, a choice of an unknown function, or a template without tools.
    """
    for function in functions:
        if not _NAME.fullmatch(function.name):
            raise BadRequest(f"{function.where}.name", "1 to 64 letters, digits, _ . or -")
    names = frozenset(function.name for function in functions)
    if len(names) != len(functions):
        raise BadRequest("tools", "a name of its own for every function")
    template = None if template is None else template_with_tools(template)
    if not has_variable(template, "tools"):
        raise BadRequest("tools", "null: the model's chat template takes no tools")
    if choice.kind == "none":
        return ToolUse()
    if choice.kind == "auto":
        form = call_form(template or "")
        if form is None:
            raise BadRequest("tool_choice", f"{choice.forcing}: calls of this model's template are not read from text")
        if answer is not None and form != "tags":
            raise BadRequest(answer_field, "null or any text, unless no tool may be called: a call does not match it")
        return _left_to_the_model(functions, choice, form, answer)
    if choice.name is not None:
        functions = [function for function in functions if function.name == choice.name]
        if not functions:
            raise BadRequest(choice.field, f"one of {', '.join(sorted(names))}")
    return ToolUse(names, None, one_call([_signature(function) for function in functions]))


def _left_to_the_model(
    functions: list[Function], choice: Choice, form: CallForm, answer: dict[str, Any] | None
) -> ToolUse:
    names = frozenset(function.name for function in functions)
    # Of those that are not strict only the form is kept: nobody relies on more, and their schemas may be of any kind.
    signatures = [_signature(f) if f.strict else _signature(f)._replace(schema=None) for f in functions]
    if answer is not None:
        return ToolUse(names, form, calls_or_json(signatures, answer, at_most_one=choice.at_most_one))
    own_stop = (CLOSE,) if choice.at_most_one and form != "json" else ()
    if form == "parameters":
        _refuse_strict(functions, choice)
        texts = (texts_of(function.name, function.parameters) for function in functions)
        return ToolUse(names, form, own_stop=own_stop, texts=frozenset[tuple[str, str]]().union(*texts))
    if any(function.strict for function in functions):
        return ToolUse(names, form, calls_in_text(signatures, form, at_most_one=choice.at_most_one))
    return ToolUse(names, form, own_stop=own_stop)


def _refuse_strict(functions: list[Function], choice: Choice) -> None:
    for function in functions:
        if function.strict:
            expected = f"false, or tool_choice {choice.forcing}: no grammar keeps the calls of this model's template"
            raise BadRequest(f"{function.where}.strict", expected)


def _signature(function: Function) -> Signature:
    return Signature(function.name, function.parameters, f"{function.where}.{function.schema_field}")


def template_tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, object]:
    """A function as chat templates read it."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def template_call(id: str, name: str, arguments: dict[str, Any]) -> dict[str, object]:
    """A call of an assistant's message as chat templates read it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


class Piece(NamedTuple):
    """Text for the reader, and calls that are complete, in their order."""

    items: list[str | Call]

    @property
    def text(self) -> str:
        return "".join(item for item in self.items if isinstance(item, str))

    @property
    def calls(self) -> list[Call]:
        return [item for item in self.items if isinstance(item, Call)]


@dataclass(slots=True)
class CallReader:
    """Reads one sample's text as it grows; text and calls come out in order, nothing twice.

    What looks like a call but is none (broken JSON, a name that was not offered) is text.
    """

    use: ToolUse
    id_prefix: str = "call_"
    _held: str = ""
    _after_call: bool = False

    def feed(self, text: str) -> Piece:
        """What ``text`` completes. Text that may be the beginning of a call is held back."""
        if not self.use.names:
            return Piece([text])
        self._held += text
        if self.use.form in ("tags", "parameters"):
            return self._tagged(ended=False)
        if self.use.form == "json" and not (self._held.lstrip() or "{").startswith("{"):
            out, self._held = self._held, ""
            self.use = ToolUse()
            return Piece([out])
        return Piece([])

    def finish(self) -> Piece:
        """What is left when the sample has ended."""
        if self.use.form in ("tags", "parameters"):
            return self._tagged(ended=True)
        held, self._held = self._held, ""
        call = self._call(held, "parameters" if self.use.form == "json" else "arguments")
        return Piece([held if call is None else call])

    def _tagged(self, *, ended: bool) -> Piece:
        out: list[str | Call] = []
        while True:
            if self._after_call:
                # White space around calls is no text.
                self._held = self._held.lstrip()
            at = self._held.find(OPEN)
            if at < 0:
                out.append(self._plain(ended=ended))
                return Piece(out)
            before, self._held = self._held[:at], self._held[at:]
            close = self._close()
            if close is None and not ended:
                kept = before.rstrip()
                out.append(kept)
                self._after_call = self._after_call and not kept
                self._held = before[len(kept) :] + self._held
                return Piece(out)
            call = self._call(self._held[len(OPEN) : close], "arguments")
            if call is not None:
                out.append(before.rstrip())
                out.append(call)
                self._held = "" if close is None else self._held[close + len(CLOSE) :]
            else:
                out.append(before + OPEN)
                self._held = self._held[len(OPEN) :]
            self._after_call = call is not None

    def _plain(self, *, ended: bool) -> str:
        """Text that no call can follow directly any more, taken from what is held."""
        text = self._held
        if not ended:
            text = text[: len(text) - _overlap(text, OPEN)].rstrip()
        self._held = self._held[len(text) :]
        if text:
            self._after_call = False
        return text

    def _close(self) -> int | None:
        """Where the call that begins the held text closes; a tag within a JSON string closes nothing."""
        if self.use.form == "parameters":
            return self._function_close()
        found = (match for match in _STRING_OR_CLOSE.finditer(self._held, len(OPEN)) if match[0] == CLOSE)
        return next((match.start() for match in found), None)

    def _function_close(self) -> int | None:
        """The same where a function by tags is to follow; what cannot become one closes with the next tag."""
        if (end := _FUNCTION_CLOSE.search(self._held, len(OPEN))) is not None:
            return end.end()
        begun = self._held[len(OPEN) :].lstrip()[: len(OPEN_FUNCTION)]
        at = -1 if OPEN_FUNCTION.startswith(begun) else self._held.find(CLOSE, len(OPEN))
        return None if at < 0 else at

    def _call(self, text: str, arguments: str) -> Call | None:
        if self.use.form == "parameters":
            read = read_call(text, self.use.texts)
            return self._named(*read) if read is not None and read.name in self.use.names else None
        try:
            value = msgspec.json.decode(text.strip(), type=dict[str, Any])
            name, given = value.get("name"), value.get(arguments)
            is_call = value.keys() == {"name", arguments} and isinstance(name, str) and name in self.use.names
            if not (is_call and isinstance(given, dict)):
                return None
            return self._named(str(name), given)
        except (msgspec.MsgspecError, RecursionError):
            return None

    def _named(self, name: str, arguments: dict[str, Any]) -> Call:
        return Call(f"{self.id_prefix}{new_id()}{new_id()}", name, msgspec.json.encode(arguments).decode())


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def has_variable(template: str | None, name: str) -> bool:
    """Whether a chat template, which the worker alone runs, names a variable; a model without one has none."""
    return template is not None and re.search(rf"\b{name}\b", template) is not None
