"""Grammars of calls: text whose calls keep their functions' schemas from the opening on, or one call and nothing else.

They are Lark as llguidance reads it, with a JSON schema of its own for each function, so that what references mean in
one is no other's business.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from selfloop.server.shared.decode import to_json
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import StructuredOutput

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# As models were trained to write a call: nothing but a space after each separator.
_SPACED = {
    "whitespace_pattern": None,
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
# Bounded, as endless white space is what weak models get lost in.
_LOOSE = {"whitespace_pattern": r"[ \n]{1,40}"}
_SPACE = r"SPACE: /[ \n]{0,2}/"
# Python takes four more characters for white space than the grammars' expressions do.
_NO_CALL_AT_START = r"PLAIN: /[\s\x1c-\x1f]*([^\s\x1c-\x1f{](?s:.*))?/"
_OPENED = f'opened[lazy]: /(?s:.*)/ "{OPEN}"'
_NO_OPENING = f"PLAIN: /(?s:.*)/ & ~/(?s:.*){OPEN}(?s:.*)/"


class Signature(NamedTuple):
    """A function by what its calls must be.

    Args:
        schema: JSON schema of its arguments; None for any object.
        where: the field that gives the schema.
    """

    name: str
    schema: dict[str, Any] | None
    where: str


def one_call(functions: Sequence[Signature]) -> StructuredOutput:
    """One call of one of the functions, as a JSON object.

    Raises:
        BadRequest: the arguments of a function can be no object.
    """
    return _grammar("start: call", *_calls(functions, "arguments"))


def calls_in_text(
    functions: Sequence[Signature], form: Literal["tags", "json"], *, at_most_one: bool
) -> StructuredOutput:
    """Any text, in which whatever opens a call goes on as a call of one of the functions.

    Args:
        form: where a call stands: between tags, or as the whole text; then it opens with a brace.
        at_most_one: nothing follows the first call.

    Raises:
        BadRequest: the arguments of a function can be no object.
    """
    if form == "json":
        return _grammar("start: SPACE call SPACE | PLAIN", _SPACE, _NO_CALL_AT_START, *_calls(functions, "parameters"))
    call = f'opened SPACE call SPACE "{CLOSE}"'
    start = f"start: {call} | PLAIN" if at_most_one else f"start: ({call})* PLAIN"
    return _grammar(start, _OPENED, _SPACE, _NO_OPENING, *_calls(functions, "arguments"))


def calls_or_json(functions: Sequence[Signature], text: dict[str, Any], *, at_most_one: bool) -> StructuredOutput:
    """Calls between tags and nothing else, or JSON that matches the schema ``text``. Raises as :func:`one_call`."""
    call = f'"{OPEN}" SPACE call SPACE "{CLOSE}"'
    calls = call if at_most_one else f"{call} (SPACE {call})*"
    answer = "answer: %json " + to_json({**text, "x-guidance": _LOOSE}, "response_format").decode()
    return _grammar(f"start: {calls} | answer", _SPACE, answer, *_calls(functions, "arguments"))


def _grammar(*rules: str) -> StructuredOutput:
    return StructuredOutput("grammar", "\n".join(rules))


def _calls(functions: Sequence[Signature], arguments: str) -> list[str]:
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        schema = to_json(_object_schema(function) | {"x-guidance": _SPACED}, function.where).decode()
        opening = rf'"{{\"name\": \"{function.name}\", \"{arguments}\": "'
        rules.append(f'call_{i}: {opening} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {schema}")
    return rules


def _object_schema(function: Signature) -> dict[str, Any]:
    """The schema for objects alone: arguments are nothing else."""
    schema = function.schema or {}
    kinds: object = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise BadRequest(f"{function.where}.type", f"object: arguments are one, got {to_json(kinds, 'type').decode()}")
    return schema | {"type": "object"}
