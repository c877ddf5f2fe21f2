"""Who calls, and how this dialect says no."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from selfloop.control.gateway import Control
from selfloop.server.shared.auth import authenticated_key
from selfloop.server.shared.errors import body_of, reason_of
from selfloop.server.shared.schemas import ErrorV1
from selfloop.types.errors import (
    BadRequest,
    CheckpointDamaged,
    Conflict,
    Denied,
    Forbidden,
    NotFound,
    NotReady,
    OperationFailed,
    RateLimited,
    SelfloopError,
    TooLarge,
    Unavailable,
    WorkerLost,
)

# The client repeats 408, 409, 429 and 5xx for minutes: they are only for what may succeed later.
_STATUS: dict[type[SelfloopError], int] = {
    BadRequest: 400,
    Denied: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 400,
    TooLarge: 413,
    NotReady: 429,
    Unavailable: 503,
    RateLimited: 429,
    OperationFailed: 400,
    CheckpointDamaged: 400,
    WorkerLost: 503,
}


# The shape of the other dialects' errors, under this dialect's own statuses.
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorV1, "description": "Refused, lost, or not yet"}}


class TinkerRoute(APIRoute):
    """Answers every error of ours as this dialect's client reads it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except SelfloopError as error:
                return refusal(error)

        return handle


def refusal(error: SelfloopError, status: int | None = None) -> JSONResponse:
    """The answer to a request that cannot be served."""
    headers = {"Retry-After": f"{error.retry_s:g}"} if isinstance(error, NotReady) else None
    field = error.field if isinstance(error, BadRequest) else None
    return JSONResponse(body_of(str(error), reason_of(error), field), status or _STATUS[type(error)], headers)


async def granted_team(control: Control, token: str | None) -> str | None:
    """The team that a ``weights_access_token``, which is an API key of that team, opens the checkpoints of.

    Raises:
        BadRequest: it is no key of this server.
    """
    if token is None:
        return None
    try:
        return (await authenticated_key(control.access, token)).team_id
    except Denied:
        raise BadRequest("weights_access_token", "an API key of the team that the checkpoint belongs to") from None
