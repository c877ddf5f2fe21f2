"""The door of every request: who calls, whether the role allows it, whether the key is within its limits.

It stands before the routes, so a route that is added later needs a key without saying so, and nothing of a body is
read before its sender is known. What needs no key is named here.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Access, Caller
from selfloop.server.errors import response_of
from selfloop.server.middleware import permissions
from selfloop.server.middleware.key_limits import KeyLimits
from selfloop.types.errors import Denied, SelfloopError
from selfloop.types.logline import bind

_PUBLIC_PATHS = {"/healthz", "/api/v1/healthz", "/openapi.json"}
# Tokenizer files; files by signed link, there and here.
_PUBLIC_PREFIXES = ("/hf/", "/files/", "/debug_archives/", "/uploads/")
_SCHEMES = ("bearer", "api-key")
# The Tinker client takes no key without it.
_KEY_PREFIX = "tml-"


class KeylessPaths:
    """What is answered without a key, ``more`` paths among them."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        self._paths = _PUBLIC_PATHS | set(more)

    def has(self, path: str) -> bool:
        return path in self._paths or path.startswith(_PUBLIC_PREFIXES)


class Guard:
    """Lets a request through to ``app`` with ``request.state.caller`` set, or answers it in its dialect's shape."""

    def __init__(self, app: ASGIApp, control: Control, limits: KeyLimits, keyless: KeylessPaths) -> None:
        self._app = app
        self._control = control
        self._limits = limits
        self._keyless = keyless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or self._keyless.has(path):
            await self._app(scope, receive, send)
            return
        try:
            caller = await authenticated_key(self._control.access, given_key(Headers(scope=scope)))
            bind(team_id=caller.team_id, key_id=caller.key_id)
            permissions.check(caller.role, scope["method"], path)
            admission = await self._limits.admit(caller.key_id, is_poll=_is_poll(scope["method"], path))
        except SelfloopError as error:
            await response_of(error, path)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller

        async def counted() -> Message:
            message = await receive()
            admission.received(len(message.get("body", b"")))
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            admission.end()


def given_key(headers: Headers) -> str:
    """The key that a request was sent with, or nothing."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return (headers.get("x-api-key") or (key if scheme.lower() in _SCHEMES else "")).strip()


async def authenticated_key(access: Access, given: str) -> Caller:
    """The caller behind a key, with or without ``tml-`` before it. Raises :class:`Denied`."""
    bare = given.removeprefix(_KEY_PREFIX)
    try:
        return await access.authenticate(bare)
    except Denied:
        # A key may begin with the prefix itself.
        if bare == given:
            raise
        return await access.authenticate(given)


def caller_of(request: Request) -> Caller:
    """The caller that the guard let through."""
    return request.state.caller


def _is_poll(method: str, path: str) -> bool:
    return (method == "GET" and "/operations/" in path) or path.startswith("/api/v1/retrieve_future")
