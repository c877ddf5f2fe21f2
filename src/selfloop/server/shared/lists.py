"""Lists that may be long: in pages when a caller asks for them, else whole, as a stream. Never many rows at a time.

A list is read and rendered in slices, between which the event loop serves everybody else.
"""

import asyncio
import base64
import binascii
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from fastapi import Depends, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from selfloop.control.resources.listings import Cut, Part, Place
from selfloop.types.errors import BadRequest

T = TypeVar("T")

MAX_PAGE = 1000
SLICE_ROWS = 100
"""A slice of the longest rows takes a few milliseconds to render."""

_MAX_TOKEN = 400
_JSON = "application/json"
_encode = msgspec.json.encode

Fetch = Callable[[Cut], Awaitable[Part[T]]]
Tail = Callable[[int], bytes]
"""What follows the rows of a list, of which there were so many."""


class _Token(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Where a page begins, and the digest of what was listed: another list is not gone on with."""

    list_digest: str
    at: float
    id: str


@dataclass(frozen=True, slots=True)
class Paging:
    """What a caller asks of a list; see :func:`listed`."""

    page_size: int | None
    page_token: str | None


async def _paging(
    page_size: Annotated[
        int | None,
        Query(ge=1, le=MAX_PAGE, description="So many at most, and a token for the next page. All of them without it."),
    ] = None,
    page_token: Annotated[
        str | None, Query(description="The `next_page_token` of an earlier answer to the same question.")
    ] = None,
) -> Paging:
    return Paging(page_size, page_token)


PagingOf = Annotated[Paging, Depends(_paging)]


async def listed(
    asked: Paging,
    name: str,
    about: tuple[object, ...],
    fetch: Fetch[T],
    render: Callable[[T], BaseModel],
    beside: Mapping[str, str] | None = None,
) -> Response:
    """A list as an object with the one member ``name``.

    A page has ``next_page_token`` beside it: null on the last one. Rows that are made meanwhile are no part of later
    pages, and none is listed twice.

    Args:
        about: what distinguishes this list from others: its caller's team, its filters.
        fetch: the rows that come after a place.
        beside: other members of the object.

    Raises:
        BadRequest: a token that is not of this list.
    """
    digest = _digest(name, about)
    after = None if asked.page_token is None else _place(asked.page_token, digest)

    def encode(row: T) -> bytes:
        return render(row).model_dump_json(by_alias=True).encode()

    members = [_encode(key) + b":" + _encode(value) + b"," for key, value in (beside or {}).items()]
    head = b"{" + b"".join(members) + _encode(name) + b":["
    if asked.page_size is None and asked.page_token is None:
        return await streamed(head, fetch, encode, lambda _num: b"]}")
    left = MAX_PAGE if asked.page_size is None else asked.page_size
    chunks: list[bytes] = []
    while left:
        part = await fetch(Cut(min(left, SLICE_ROWS), after))
        chunks += map(encode, part.rows)
        left, after = left - len(part.rows), part.next
        if after is None:
            break
    token = None if after is None else _token(digest, after)
    tail = b'],"next_page_token":' + _encode(token) + b"}"
    return Response(head + b",".join(chunks) + tail, media_type=_JSON)


async def page_of(name: str, rows: Sequence[T], render: Callable[[T], object], cursor: object) -> Response:
    """Rows that are at hand, as an object with the members ``name`` and ``cursor``; rendered in slices."""
    chunks: list[bytes] = []
    for first in range(0, len(rows), SLICE_ROWS):
        chunks += [_encode(render(row)) for row in rows[first : first + SLICE_ROWS]]
        await asyncio.sleep(0)
    head, tail = b"{" + _encode(name) + b":[", b'],"cursor":' + _encode(cursor) + b"}"
    return Response(head + b",".join(chunks) + tail, media_type=_JSON)


async def streamed(head: bytes, fetch: Fetch[T], encode: Callable[[T], bytes], tail: Tail) -> Response:
    """All rows between ``head`` and ``tail``: at once where they are few, else as they are read.

    An error in the first slice is answered; later, the connection breaks off, so that nobody takes a part for all.
    """
    first = await fetch(Cut(SLICE_ROWS))
    if first.next is None:
        body = head + b",".join(map(encode, first.rows)) + tail(len(first.rows))
        return Response(body, media_type=_JSON)
    return StreamingResponse(_stream(head, first, fetch, encode, tail), media_type=_JSON)


async def _stream(
    head: bytes, part: Part[T], fetch: Fetch[T], encode: Callable[[T], bytes], tail: Tail
) -> AsyncGenerator[bytes]:
    yield head
    num = 0
    while True:
        rows = b",".join(map(encode, part.rows))
        yield b"," + rows if num and rows else rows
        num += len(part.rows)
        if part.next is None:
            break
        part = await fetch(Cut(SLICE_ROWS, part.next))
    yield tail(num)


def _digest(name: str, about: tuple[object, ...]) -> str:
    return hashlib.blake2b(_encode([name, *map(str, about)]), digest_size=6).hexdigest()


def _token(digest: str, place: Place) -> str:
    raw = msgspec.msgpack.encode(_Token(digest, place.at, place.id))
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _place(token: str, digest: str) -> Place:
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True)
        known = msgspec.msgpack.decode(raw, type=_Token)
    except (binascii.Error, ValueError, msgspec.DecodeError):
        known = None
    if known is None or len(token) > _MAX_TOKEN or known.list_digest != digest:
        raise BadRequest("page_token", "the next_page_token of an earlier answer to the same question")
    return Place(known.at, known.id)
