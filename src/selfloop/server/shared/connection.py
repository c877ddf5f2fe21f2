"""Work that ends when the client that asked for it goes away."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of ``work``; the request's body must have been read.

    Raises:
        ClientDisconnect: the client went away; ``work`` was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; ``source``, which ``frames`` reads, is closed when the client has them or goes away."""

    def __init__(
        self, frames: AsyncGenerator[bytes], source: AsyncGenerator[object], headers: Mapping[str, str]
    ) -> None:
        super().__init__(frames, headers={"Cache-Control": "no-cache", **headers}, media_type="text/event-stream")
        self._frames = frames
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()
            await self._source.aclose()
