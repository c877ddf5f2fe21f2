"""Read request bodies within bounds, and keep the event loop free of the work on large ones."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

import zstandard
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from selfloop.server.shared.body_memory import BodyMemory, Lease
from selfloop.types.errors import BadRequest, NotReady, TooLarge

_MIB = 1024 * 1024
# The Loops client caps a request at 24 MiB before it adds the model's name.
MAX_BODY_BYTES = 24 * _MIB + 64 * 1024
_MAX_WINDOW_BYTES = 32 * _MIB
BODY_TIMEOUT_S = 30.0
# Below this, the work is quicker than a thread's start.
_INLINE_BYTES = 256 * 1024

T = TypeVar("T")


async def off_loop(size_bytes: int, work: Callable[[], T]) -> T:
    """Do ``work`` on ``size_bytes`` of data, in a thread when it would hold other requests up."""
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)


class RequestBody:
    """One request's body as it comes: bounded for whoever reads it, whatever is done with it afterwards."""

    def __init__(self, receive: Receive, declared: int | None, memory: BodyMemory) -> None:
        self._raw_receive = receive
        self._declared = declared
        self._lease = Lease(memory, declared)
        self._received = 0
        self._is_whole = False
        self._parts: list[bytes] = []
        self._whole: bytes | None = None

    @classmethod
    def of(cls, request: Request) -> "RequestBody":
        return request.state.body

    async def receive(self) -> Message:
        """The next message. Raises :class:`TooLarge` at the limit, :class:`NotReady` where nothing comes."""
        if (self._declared or 0) > MAX_BODY_BYTES:
            raise _too_large()
        if self._is_whole:
            return await self._raw_receive()  # Waits for the client to go.
        if self._declared is not None:
            await self._lease.cover(self._declared)
        message = await self._next()
        if self._received > MAX_BODY_BYTES:
            self._parts.append(message["body"])
            raise _too_large()
        await self._lease.cover(self._received)
        return message

    async def whole(self) -> bytes:
        """All of it, as it was sent. Raises what :meth:`receive` raises."""
        if self._whole is None:
            while not self._is_whole:
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                self._parts.append(message.get("body", b""))
            self._whole = b"".join(self._parts)
            self._parts.clear()
        return self._whole

    @property
    def num_bytes(self) -> int:
        """That have come."""
        return self._received

    @property
    def is_whole(self) -> bool:
        """Whether all of it has come, rather than its sender gone."""
        return self._is_whole

    async def parts(self) -> AsyncGenerator[bytes]:
        """What has come, from the beginning, then what comes, beyond the limit too: none of it is kept.

        Raises:
            NotReady: nothing comes any more.
        """
        if self._whole is not None:
            yield self._whole
            return
        for part in self._parts:
            yield part
        while not self._is_whole:
            message = await self._next()
            if message["type"] == "http.disconnect":
                return
            yield message.get("body", b"")

    async def unpacks_to(self, num_bytes: int) -> None:
        """The body becomes so large once it is decompressed. Raises :class:`NotReady` where there is no room."""
        await self._lease.cover(num_bytes)

    def end(self) -> None:
        """The request is at its end, and so is what was kept of its body."""
        self._whole = None
        self._parts.clear()
        self._lease.end()

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await self._raw_receive()
        except TimeoutError:
            raise NotReady(f"nothing of the body came for {BODY_TIMEOUT_S:g} s", 1.0) from None
        self._is_whole = not message.get("more_body", False)
        self._received += len(message.get("body", b""))
        return message


def num_received(request: Request) -> int:
    """Bytes of the body that have come."""
    return RequestBody.of(request).num_bytes


async def read_body(request: Request) -> bytes:
    """The whole body, decompressed. Raises :class:`TooLarge` as soon as the limit is passed."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    raw = await RequestBody.of(request).whole()
    if coding == "identity":
        return raw
    if coding != "zstd":
        raise BadRequest("Content-Encoding", f"zstd, or none; got {coding[:100]!r}")
    await RequestBody.of(request).unpacks_to(len(raw) + min(_unpacked_size(raw), MAX_BODY_BYTES))
    return await off_loop(len(raw), lambda: decompressed(raw))


def _unpacked_size(raw: bytes) -> int:
    try:
        return zstandard.frame_content_size(raw)
    except zstandard.ZstdError:
        return 0  # Refused when it is decompressed.


def decompressed(body: bytes) -> bytes:
    """One frame of zstd that states its size, which is looked at before any memory is taken for it.

    Raises:
        TooLarge: it would be longer than a body may be.
        BadRequest: it is something else, or not whole.
    """
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            raise BadRequest("body", "zstd whose frame states its size, as one-shot compression writes it")
        if size > MAX_BODY_BYTES:
            raise _too_large()
        return _decompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadRequest("body", f"one whole frame of zstd ({error})") from None


def _decompressor() -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)


def _too_large() -> TooLarge:
    return TooLarge("request body", MAX_BODY_BYTES, "bytes (24 MiB); split the data over several calls")
