"""The bounds of every request's body: its length, the time between its parts, and the memory of all of them."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from selfloop.server.shared.body import RequestBody
from selfloop.server.shared.body_memory import BodyMemory, default_body_memory


class BodyLimit:
    """Stops any request's body at the limit with :class:`TooLarge`, without reading on, whoever reads it.

    And with :class:`NotReady` when nothing comes any more, as what has come is memory of ours, or when the bodies of
    all requests together take what they may.
    """

    def __init__(self, app: ASGIApp, memory_bytes: int | None = None) -> None:
        self._app = app
        self._memory = BodyMemory(default_body_memory() if memory_bytes is None else memory_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The server has checked that it is a number, and ends a body that is longer.
        headers = Headers(scope=scope)
        is_chunked = "transfer-encoding" in headers
        body = RequestBody(receive, None if is_chunked else int(headers.get("content-length", "0")), self._memory)
        scope.setdefault("state", {})["body"] = body
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.end()
