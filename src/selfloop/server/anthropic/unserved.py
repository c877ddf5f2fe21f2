"""Blocks by their types; what the clients know and this server does not is refused where it asks for something."""

from typing import Any, TypeVar

import msgspec

from selfloop.server.anthropic import wire
from selfloop.server.shared.decode import convert, to_json
from selfloop.types.errors import BadRequest

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
    "transformations": ({},),
}


def refuse_unserved(body: msgspec.Struct, prefix: str = "") -> None:
    """Raises :class:`BadRequest` for a known field that asks for something that is not served."""
    for given in msgspec.structs.fields(body):
        value: object = getattr(body, given.name)
        if given.type is wire.Unserved and value is not None and value not in _NEUTRAL.get(given.name, ()):
            neutral = [msgspec.json.encode(v).decode() for v in _NEUTRAL.get(given.name, ())]
            raise BadRequest(prefix + given.name, " or ".join(["null", *neutral]) + ": not served here")


def block(given: dict[str, Any], kind: type[S], where: str) -> S:
    """A block of this kind. Raises :class:`BadRequest` for a key that is wrong or not served."""
    found = convert(given, kind, where)
    refuse_unserved(found, f"{where}.")
    return found


def texts(content: str | list[dict[str, Any]] | None, where: str) -> list[str]:
    """Of a content that has nothing else. Raises :class:`BadRequest`."""
    if content is None or isinstance(content, str):
        return [content] if content else []
    found: list[str] = []
    for i, given in enumerate(content):
        if given.get("type") != "text":
            raise BadRequest(f"{where}[{i}]", f"a block of type text, got {shown_type(given)}")
        found.append(block(given, wire.TextBlock, f"{where}[{i}]").text)
    return found


def shown_type(given: dict[str, Any]) -> str:
    """A block's type, for an error."""
    return to_json(given.get("type"), "type").decode()[:100]
