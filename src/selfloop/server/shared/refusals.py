"""Refused operations keep their place in a run's order: the client has counted the ``seq_id`` and never sends it again.

What was refused may be a body that does not decode, so its place is searched for in the bytes themselves.
"""

import gzip
import hashlib
import io
import re
import zlib
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, NamedTuple

import zstandard
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from selfloop.server.shared.auth import control_of
from selfloop.server.shared.body import MAX_BODY_BYTES, RequestBody, off_loop
from selfloop.types.errors import NotReady, SelfloopError, WorkerLost
from selfloop.types.resources import Run

# How much of a body that is too large is looked through.
_MAX_SEARCHED_BYTES = 4 * MAX_BODY_BYTES
_MAX_TOKENS = 2_000_000
_UNPACKED_BYTES = 2**18
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TOKEN = re.compile(_STRING + rb'|["{}\[\]]', re.DOTALL)
_STRING_END = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_FIELD = re.compile(rb'"(seq_id|model_id)"\s*+:\s*+(?:(\d{1,19})(?=[\s,}])|"([^"\\]{1,200})")')
# A field of the two, whole, with room for spaces.
_LOOK_AHEAD = 512
_MAGIC_ZSTD, _MAGIC_GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"


class Place(NamedTuple):
    """What a body says of its place; None for what cannot be found."""

    seq_id: int | None = None
    model_id: str | None = None


class JsonPlace:
    """Finds ``seq_id`` and ``model_id`` at the top of a JSON object that comes in parts and may be broken anywhere."""

    def __init__(self) -> None:
        self._found: dict[bytes, bytes] = {}
        self._depth = 0
        self._carried = b""
        self._is_in_string = False
        self._tokens_left = _MAX_TOKENS

    def feed(self, part: bytes, *, is_last: bool = False) -> None:
        data, self._carried = self._carried + part, b""
        at = 0
        if self._is_in_string:
            end = _STRING_END.match(data)
            if end is None:
                # A backslash and what it escapes stay together.
                self._carried = b"\\" if _ends_in_escape(data) else b""
                return
            self._is_in_string, at = False, end.end()
        for token in _TOKEN.finditer(data, at):
            self._tokens_left -= 1
            if self._tokens_left < 0:
                return
            start, text = token.start(), token[0]
            if self._depth == 1 and text[0] == 0x22 and not is_last and len(data) - start < _LOOK_AHEAD:
                self._carried = data[start:]
                return
            if text == b'"':
                # It has no end in this part.
                self._is_in_string = True
                self._carried = b"\\" if _ends_in_escape(data) else b""
                return
            if text in (b"{", b"["):
                self._depth += 1
            elif text in (b"}", b"]"):
                self._depth -= 1
            elif self._depth == 1 and (field := _FIELD.match(data, start)) is not None:
                self._found[field[1]] = field[2] or field[3]

    @property
    def place(self) -> Place:
        seq_id, model_id = self._found.get(b"seq_id", b""), self._found.get(b"model_id", b"")
        return Place(int(seq_id) if seq_id.isdigit() else None, model_id.decode("utf-8", "replace") or None)


def _ends_in_escape(data: bytes) -> bool:
    return (len(data) - len(data.rstrip(b"\\"))) % 2 == 1


async def json_place(request: Request) -> Place:
    """The place that the request's JSON names, whatever else is wrong with it."""
    finder = JsonPlace()
    searched = 0
    async with aclosing(RequestBody.of(request).parts()) as parts:
        async for part in parts:
            if searched == 0 and _is_packed(part):
                raw = part + await _rest(parts)
                await off_loop(len(raw), lambda raw=raw: _feed_unpacked(finder, raw))
                break
            await off_loop(len(part), lambda part=part: finder.feed(part))
            searched += len(part)
            if searched > _MAX_SEARCHED_BYTES:
                break
    finder.feed(b"", is_last=True)
    return finder.place


def _is_packed(first: bytes) -> bool:
    """Whatever the request says of its coding: that may be what was refused."""
    return first.startswith((_MAGIC_ZSTD, _MAGIC_GZIP))


async def _rest(parts: AsyncGenerator[bytes]) -> bytes:
    kept = bytearray()
    async for part in parts:
        if len(kept) + len(part) <= MAX_BODY_BYTES:
            kept += part
    return bytes(kept)


def unpacked(raw: bytes) -> Iterator[bytes]:
    """The plain bytes of what is compressed, in parts, up to where it is broken."""
    unpack: Any = None
    if raw.startswith(_MAGIC_ZSTD):
        unpack = zstandard.ZstdDecompressor(max_window_size=2**25).stream_reader(raw)
    elif raw.startswith(_MAGIC_GZIP):
        unpack = gzip.GzipFile(fileobj=io.BytesIO(raw))
    else:
        yield raw
        return
    left = _MAX_SEARCHED_BYTES
    try:
        while left > 0 and (part := unpack.read(_UNPACKED_BYTES)):
            left -= len(part)
            yield part
    except (zstandard.ZstdError, zlib.error, OSError, EOFError):
        return


async def plain_start(request: Request) -> bytes:
    """As much of the request's plain bytes as a body may have. Raises :class:`NotReady` where there is no room."""
    body = RequestBody.of(request)
    async with aclosing(body.parts()) as parts:
        raw = await _rest(parts)
    if not _is_packed(raw):
        return raw
    await body.unpacks_to(len(raw) + MAX_BODY_BYTES)
    return await off_loop(MAX_BODY_BYTES, lambda: _start_of(unpacked(raw)))


def _start_of(parts: Iterator[bytes]) -> bytes:
    kept = bytearray()
    for part in parts:
        kept += part[: MAX_BODY_BYTES - len(kept)]
        if len(kept) == MAX_BODY_BYTES:
            break
    return bytes(kept)


def _feed_unpacked(finder: JsonPlace, raw: bytes) -> None:
    for part in unpacked(raw):
        finder.feed(part)


def is_final(error: Exception) -> bool:
    """Whether the client gives the call up after ``error``."""
    if isinstance(error, SelfloopError):
        return not isinstance(error, NotReady | WorkerLost)
    return isinstance(error, RequestValidationError) or (isinstance(error, HTTPException) and error.status_code < 500)


async def _digest(request: Request) -> str | None:
    """What distinguishes a repetition from another request; None for a body that does not come whole."""
    try:
        raw = await RequestBody.of(request).whole()
    except (SelfloopError, ClientDisconnect):
        return None
    path = request.url.path.encode()
    return await off_loop(len(raw), lambda: hashlib.sha256(path + b"\0" + raw).hexdigest())


async def check_not_refused(request: Request, run: Run, seq: int | None) -> None:
    """Raises what the same request was refused with before: nothing that changed since makes it another."""
    known = None if seq is None else control_of(request).operations.refusal(run.id, seq)
    if known is not None and known.digest == await _digest(request):
        raise known.error.with_traceback(None)


class OperationRoute(APIRoute):
    """A route that takes operations of a run, and notes the place of each that it refuses."""

    @abstractmethod
    async def place(self, request: Request) -> tuple[Run, int] | None:
        """The run and the place that a refused request was for."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                if is_final(error) and (found := await self._found(request)) is not None:
                    run, seq = found
                    operations = control_of(request).operations
                    await operations.skip(run, seq)
                    if isinstance(error, SelfloopError) and (digest := await _digest(request)) is not None:
                        operations.remember_refusal(run.id, seq, digest, error)
                raise

        return handle

    async def _found(self, request: Request) -> tuple[Run, int] | None:
        try:
            return await self.place(request)
        except SelfloopError:
            return None  # No run of the caller's, or no more of the body comes.
