"""What every answer says to browsers, and which name a server of this machine alone may be called by."""

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfloop.server.errors import body_of

# No page may frame, guess the type of, or pass on the address (a signed link) of what is here; no page may run here.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class BrowserHeaders:
    """Adds the headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


class LocalNames:
    """Refuses requests without a key that call a server of this machine by a stranger's name.

    A web page can have a name of its own resolve to 127.0.0.1, and then reads what needs no key as its own. It has
    no key, so the others are not asked. ``names`` are allowed beside those of this machine.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            is_keyless = "authorization" not in headers and "x-api-key" not in headers
            name = host_name(headers.get("host", ""))
            if is_keyless and name not in self._names and not is_local(name):
                message = f"this server is of its own machine alone, not {name[:100]!r}; see --public-url"
                await JSONResponse(body_of(message, "MISDIRECTED"), 421)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_name(host: str) -> str:
    """A Host header without its port, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def is_local(name: str) -> bool:
    """Whether a host name or address can only be this machine; no name at all can be no page's."""
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
