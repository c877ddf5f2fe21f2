"""Calls with a tag for each parameter, as Qwen3.5 and Qwen3-Coder write them between the tags of a call:

<function=look_up>
<parameter=city>
Paris
</parameter>
</function>
"""

import re
from collections.abc import Set
from typing import Any, NamedTuple

import msgspec

OPEN_FUNCTION = "<function="
# What follows the name on its line, and one line break on each side of a value, are no part of them.
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
# Templates write values that are no text as Python or as JSON does.
_PYTHON = {"True": True, "False": False, "None": None}


class TaggedCall(NamedTuple):
    """A function's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def read_call(text: str, texts: Set[tuple[str, str]]) -> TaggedCall | None:
    """The call that ``text`` is, None where it is none.

    Args:
        texts: functions and those of their parameters that are text, whatever it looks like. Other values are JSON
            (or Python's ``True``, ``False`` and ``None``) where they can be read as such, else text.
    """
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return None
    name, body, at = function[1].strip(), function[2], 0
    arguments: dict[str, Any] = {}
    while (parameter := _PARAMETER.match(body, at)) is not None:
        key, at = parameter[1].strip(), parameter.end()
        arguments[key] = parameter[2] if (name, key) in texts else _value(parameter[2])
    return None if body[at:].strip() else TaggedCall(name, arguments)


def texts_of(name: str, parameters: dict[str, Any] | None) -> frozenset[tuple[str, str]]:
    """The function with each parameter that its JSON schema says to be text and nothing else."""
    properties: object = (parameters or {}).get("properties")
    if not isinstance(properties, dict):
        return frozenset()
    return frozenset(
        (name, str(key)) for key, schema in properties.items() if isinstance(schema, dict) and _is_text(schema)
    )


def _is_text(schema: dict[str, Any]) -> bool:
    values: object = schema.get("enum")
    return schema.get("type") == "string" or (
        isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)
    )


def _value(text: str) -> Any:
    if text.strip() in _PYTHON:
        return _PYTHON[text.strip()]
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return text
