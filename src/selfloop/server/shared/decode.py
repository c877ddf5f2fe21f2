"""JSON bodies as structs; what does not fit is refused by field."""

import re
from collections.abc import Iterator
from typing import TypeVar

import msgspec
from fastapi import Request
from msgspec import inspect

from selfloop.server.shared.body import off_loop
from selfloop.types.errors import BadRequest

T = TypeVar("T")

_PATH = re.compile(r" - at `\$\.?(.*)`$")
_STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")
_NO_CHOICE = "Invalid enum value "
_NAMED = re.compile(r"Object (?:contains unknown|missing required) field `(.*?)`")


def decode(body: bytes, type_: type[T]) -> T:
    """Decode JSON; raises :class:`BadRequest` naming the field."""
    check_utf8(body)
    try:
        return msgspec.json.decode(body or b"{}", type=type_)
    except msgspec.ValidationError as error:
        _check_syntax(body)  # of the whole: a field that does not fit is reported before the rest is read
        raise _refusal(str(error), type_) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest("body", f"valid JSON ({error})") from None


def convert(value: object, type_: type[T], field: str) -> T:
    """What was decoded, as a struct; raises :class:`BadRequest` naming the field below ``field``."""
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        refusal = _refusal(str(error), type_)
        below = "" if refusal.field == "body" else f".{refusal.field}"
        raise BadRequest(field + below, refusal.expected) from None


def check_utf8(body: bytes) -> None:
    """Raises :class:`BadRequest` for what is not text: also in a field that nobody reads, or that is handed on."""
    if body.isascii():
        return
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest("body", f"JSON in UTF-8 ({error.reason} at byte {error.start})") from None


def check_json(body: bytes) -> None:
    """Raises :class:`BadRequest` for anything but JSON of UTF-8 text without half surrogates, NaN and infinity."""
    check_utf8(body)
    _check_syntax(body)


async def json_is_text(request: Request) -> None:
    """Of routes whose bodies the framework decodes: Python's own decoder takes halves of surrogates and more."""
    if body := await request.body():
        await off_loop(len(body), lambda: check_json(body))


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


def _refusal(text: str, type_: object) -> BadRequest:
    path = _PATH.search(text)
    message = _PATH.sub("", text)
    named = _NAMED.match(message)
    if message.startswith(_NO_CHOICE):
        steps: list[str] = _STEP.findall(path[1]) if path else []
        may_be = [msgspec.json.encode(value).decode() for value in _choices(inspect.type_info(type_), steps)]
        message = f"{' or '.join(dict.fromkeys(may_be))}, got {message.removeprefix(_NO_CHOICE)}"
    field = ".".join(part for part in (path[1] if path else "", named[1] if named else "") if part)
    return BadRequest(field or "body", message)


def _choices(type_: inspect.Type, steps: list[str]) -> Iterator[object]:
    """The values that a type lists at a place below it."""
    match type_:
        case inspect.UnionType():
            for one in type_.types:
                yield from _choices(one, steps)
        case inspect.LiteralType() if not steps:
            yield from type_.values
        case inspect.EnumType() if not steps:
            yield from (value.value for value in type_.cls)
        case inspect.StructType() if steps:
            for field in type_.fields:
                if field.encode_name == steps[0]:
                    yield from _choices(field.type, steps[1:])
        case inspect.ListType() if steps:
            yield from _choices(type_.item_type, steps[1:])
        case inspect.DictType() if steps:
            yield from _choices(type_.value_type, steps[1:])
        case _:
            pass
