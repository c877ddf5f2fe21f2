"""Whose request it is: decided here, before anything else looks at it."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from selfloop.server.shared.dialect import Dialects


class RequestDialect:
    """Gives ``app`` a request with its dialect in its state, under the path that this dialect has here.

    Clients of others expect their paths at the root of a server; each dialect says which of those are its own.
    """

    def __init__(self, app: ASGIApp, dialects: Dialects) -> None:
        self._app = app
        self._dialects = dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            # Whoever stands before us, and answers what we raise, has this state, too.
            scope.setdefault("state", {})
            path: str = scope["path"]
            meant = self._dialects.natural(path, Headers(scope=scope))
            if meant != path:
                raw: bytes = scope.get("raw_path") or path.encode()
                prefix = meant.removesuffix(path).encode()
                scope = dict(scope) | {"path": meant, "raw_path": prefix + raw}
            self._dialects.decide(scope)
        await self._app(scope, receive, send)
