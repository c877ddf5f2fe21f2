"""Who calls, and how this dialect says no."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from selfloop.control.resources.access import Caller
from selfloop.server.auth import control_of
from selfloop.server.errors import body_of, reason_of
from selfloop.types.errors import (
    BadRequest,
    Conflict,
    Denied,
    NotFound,
    NotReady,
    OperationFailed,
    SelfloopError,
    TooLarge,
    WorkerLost,
)

# The client repeats 408, 409, 429 and 5xx for minutes: they are only for what may succeed later.
_STATUS: dict[type[SelfloopError], int] = {
    BadRequest: 400,
    Denied: 401,
    NotFound: 404,
    Conflict: 400,
    TooLarge: 413,
    NotReady: 429,
    OperationFailed: 400,
    WorkerLost: 503,
}
_KEY_PREFIX = "tml-"


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


async def caller_of(request: Request) -> Caller:
    """The caller behind ``X-API-Key`` or a bearer token: a key of ours, with or without ``tml-`` before it."""
    access = control_of(request).access
    given = request.headers.get("x-api-key")
    if given is None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else ""
    given = given.strip()
    if not given:
        raise Denied("an API key is required: X-API-Key: tml-<key>")
    bare = given.removeprefix(_KEY_PREFIX)
    if bare != given:
        # A key may begin with the prefix itself.
        try:
            return await access.authenticate(bare)
        except Denied:
            pass
    return await access.authenticate(given)


CallerOf = Annotated[Caller, Depends(caller_of)]
