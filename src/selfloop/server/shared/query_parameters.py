"""Query parameters are read or refused by name, on every route of every dialect; the routes only declare theirs.

What a hosted service documents and what says nothing here is declared by its route, too, with the reason.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin
from urllib.parse import unquote_to_bytes

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from selfloop.types.errors import BadRequest

Declared = Mapping[str, bool]
"""The parameters of a route, by name: whether each may be given several times."""

_MAX_SHOWN = 100
_NOT_ENCODED = re.compile(rb"%(?![0-9a-fA-F]{2})")
_declared: dict[int, tuple[APIRoute, Declared]] = {}


async def check_query(request: Request) -> None:
    """A dependency of every route.

    Raises:
        BadRequest: a parameter that the route has not, or has once and got twice, or one that is not UTF-8.
    """
    if raw := request.scope["query_string"]:
        check(raw, declared_by(request.scope["route"]))


def check(raw: bytes, declared: Declared) -> None:
    """Hold a query string against what its route declares. Raises :class:`BadRequest`."""
    seen: set[str] = set()
    for name, value in _pairs(raw):
        if name not in declared:
            raise BadRequest(name[:_MAX_SHOWN] or "query", _unknown(name, value, declared))
        if name in seen and not declared[name]:
            raise BadRequest(name, "given once, got it several times")
        if "\0" in value:
            raise BadRequest(name, "text without NUL characters")
        seen.add(name)


def declared_by(route: APIRoute) -> Declared:
    """What a route's function and its dependencies read of the query."""
    known = _declared.get(id(route))
    if known is None:
        # The route is kept beside its id, which is another's once it is gone.
        known = _declared[id(route)] = route, dict(_of_dependant(route.dependant))
    return known[1]


def check_plain_routes(app: FastAPI) -> None:
    """Let the routes that FastAPI adds by itself, and which have no dependencies, take no parameters."""
    for route in app.routes:
        if isinstance(route, Route) and not isinstance(route, APIRoute):
            route.app = _without_parameters(route.app)


def _without_parameters(inner: ASGIApp) -> ASGIApp:
    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        check(scope["query_string"], {})
        await inner(scope, receive, send)

    return checked


def _of_dependant(dependant: Any) -> Iterator[tuple[str, bool]]:
    for field in dependant.query_params:
        annotation = field.field_info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, inner in annotation.model_fields.items():
                yield inner.alias or name, _is_many(inner.annotation)
        else:
            yield field.alias, _is_many(annotation)
    for inner in dependant.dependencies:
        yield from _of_dependant(inner)


def _is_many(annotation: Any) -> bool:
    """Whether values of a type are lists, or may be."""
    origin = get_origin(annotation)
    return origin is list or (origin in (Union, UnionType) and any(map(_is_many, get_args(annotation))))


def _pairs(raw: bytes) -> Iterator[tuple[str, str]]:
    """Names and values. Raises :class:`BadRequest` for bytes that are no text, which would be read as other ones."""
    for part in raw.split(b"&"):
        if not part:
            continue
        name, _, value = part.replace(b"+", b" ").partition(b"=")
        try:
            yield _text(name), _text(value)
        except ValueError:
            shown = unquote_to_bytes(name).decode(errors="replace")[:_MAX_SHOWN]
            raise BadRequest(shown or "query", "percent-encoded UTF-8") from None


def _text(encoded: bytes) -> str:
    if _NOT_ENCODED.search(encoded):
        raise ValueError(encoded)
    return unquote_to_bytes(encoded).decode()


def _unknown(name: str, value: str, declared: Declared) -> str:
    if not name:
        return f"names with values, got {'=' + value[:_MAX_SHOWN]!r}"
    if not declared:
        return "unknown query parameter; this route takes none"
    near = difflib.get_close_matches(name, declared, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown query parameter{meant}; this route takes {', '.join(sorted(declared))}"
