"""The door of every request: who calls, whether the role allows it, whether the key is within its limits.

It stands before the routes, so a route that is added later needs a key without saying so, and nothing of a body is
read before its sender is known. What needs no key, and what a role may do, each dialect says of its own paths.

An admin may do everything in its team, a member all but manage keys. A read-only key may list, download and watch. It
takes no part in a run: no operations, samples, polls or keepalives, which spend compute or keep capacity awake.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfloop.control.gateway import Control
from selfloop.server.middleware.key_limits import Admission, KeyLimiter
from selfloop.server.shared.auth import authenticated_key, check_may_change, given_key
from selfloop.server.shared.dialect import Dialect, dialect_of
from selfloop.types.errors import Forbidden, SelfloopError
from selfloop.types.logline import bind
from selfloop.types.roles import Role


class Guard:
    """Lets a request through to ``app`` with ``request.state.caller`` set, or answers it in its dialect's shape."""

    def __init__(self, app: ASGIApp, control: Control, limits: KeyLimiter) -> None:
        self._app = app
        self._control = control
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or dialect_of(scope).is_keyless(scope["path"]):
            await self._app(scope, receive, send)
            return
        dialect = dialect_of(scope)
        try:
            admission = await self._admitted(scope, dialect)
        except SelfloopError as error:
            await dialect.errors.response(error, scope["path"])(scope, receive, send)
            return

        async def counted() -> Message:
            message = await receive()
            admission.received(len(message.get("body", b"")))
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            admission.end()

    async def _admitted(self, scope: Scope, dialect: Dialect) -> Admission:
        method, path = str(scope["method"]), str(scope["path"])
        caller = await authenticated_key(self._control.access, given_key(Headers(scope=scope)))
        bind(team_id=caller.team_id, key_id=caller.key_id)
        check_role(dialect, caller.role, method, path)
        admission = await self._limits.admit(caller.key_id, is_poll=dialect.poll_of(method, path) is not None)
        scope["state"]["caller"] = caller
        return admission


def check_role(dialect: Dialect, role: Role, method: str, path: str) -> None:
    """Raises :class:`Forbidden` unless a key of ``role`` may send such a request."""
    if role != Role.ADMIN and dialect.is_admin_only(method, path):
        raise Forbidden(role, "an admin key of the team")
    if not dialect.only_reads(method, path):
        check_may_change(role)
