"""JSON bodies as structs; what does not fit is refused by field."""

import re
from typing import TypeVar

import msgspec

from selfloop.types.errors import BadRequest

T = TypeVar("T")

_PATH = re.compile(r" - at `\$\.?(.*)`$")
_NAMED = re.compile(r"Object (?:contains unknown|missing required) field `(.*?)`")


def decode(body: bytes, type_: type[T]) -> T:
    """Decode JSON; raises :class:`BadRequest` naming the field."""
    try:
        return msgspec.json.decode(body or b"{}", type=type_)
    except msgspec.ValidationError as error:
        _check_syntax(body)  # of the whole: a field that does not fit is reported before the rest is read
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest("body", f"valid JSON ({error})") from None


def convert(value: object, type_: type[T], field: str) -> T:
    """What was decoded, as a struct; raises :class:`BadRequest` naming the field below ``field``."""
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        refusal = _refusal(str(error))
        below = "" if refusal.field == "body" else f".{refusal.field}"
        raise BadRequest(field + below, refusal.expected) from None


def to_json(value: object, field: str) -> bytes:
    """JSON of what was decoded from a request; raises :class:`BadRequest` naming ``field`` where it goes too deep."""
    try:
        return msgspec.json.encode(value)
    except RecursionError:
        raise BadRequest(field, "JSON that is not nested too deeply") from None


def _check_syntax(body: bytes) -> None:
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest("body", f"valid JSON ({error})") from None


def _refusal(text: str) -> BadRequest:
    path = _PATH.search(text)
    message = _PATH.sub("", text)
    named = _NAMED.match(message)
    field = ".".join(part for part in (path[1] if path else "", named[1] if named else "") if part)
    return BadRequest(field or "body", message)
