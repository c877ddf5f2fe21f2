"""Security headers of every answer, and the host names that a server on a local address accepts."""

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfloop.control.gateway import Control
from selfloop.server.shared.auth import authenticated_key, given_key
from selfloop.server.shared.dialect import dialect_of
from selfloop.types.errors import Denied

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
    """Refuses requests without a valid key that call a server of this machine by a foreign host name.

    A web page can have a name of its own resolve to 127.0.0.1, and then reads what needs no key as its own. It may
    send headers as it likes, but it has no key. ``names`` are allowed beside those of this machine.
    """

    def __init__(self, app: ASGIApp, control: Control, names: Iterable[str]) -> None:
        self._app = app
        self._control = control
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            name = host_name(host)
            is_ours = name is not None and (name in self._names or is_local(name))
            if not is_ours and not await self._has_key(headers):
                message = f"this server is of its own machine alone, not {host[:100]!r}; see --public-url"
                body = dialect_of(scope).errors.plain_body(421, message, "MISDIRECTED")
                await JSONResponse(body, 421)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _has_key(self, headers: Headers) -> bool:
        given = given_key(headers)
        if not given:
            return False
        try:
            await authenticated_key(self._control.access, given)
        except Denied:
            return False
        return True


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]@/\\,]*))(?::\d*)?")


def host_name(host: str) -> str | None:
    """A Host header without its port and the root's dot, in lower case; None for what is no host."""
    parts = _HOST.fullmatch(host)
    if parts is None:
        return None
    return (parts[1] or parts[2]).lower().removesuffix(".")


def is_local(name: str) -> bool:
    """Whether a host name or address can only be this machine; no name at all can be no page's."""
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (address if mapped is None else mapped).is_loopback
