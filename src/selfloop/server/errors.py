"""The error tree as HTTP. One shape that every Loops client reads; the data plane differs where it must."""

import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

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

log = logging.getLogger(__name__)

# The Loops clients take a plain 400, 404, 408 or 502 of the data plane for a server that is still starting, and
# retry for ten minutes. A 4xx that says which gateway refused it reaches the caller at once.
_DATA_PLANE_PREFIX = "/loops/"
_FINAL = {"X-Baseten-Error-Source": "06"}

_STATUS: dict[type[SelfloopError], int] = {
    BadRequest: 422,
    Denied: 401,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    NotReady: 408,
    OperationFailed: 500,
    WorkerLost: 500,
}


def reason_of(error: SelfloopError) -> str:
    """A stable code for the kind of error, e.g. ``NOT_FOUND``."""
    name = type(error).__name__
    return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


def body_of(message: str, reason: str, field: str | None = None) -> dict[str, object]:
    """The error body: ``message`` and ``detail`` for people, ``details.reason`` for programs."""
    details: dict[str, object] = {"reason": reason}
    if field is not None:
        details["field"] = field
    return {"code": reason, "message": message, "detail": message, "details": details}


def response_of(error: SelfloopError, path: str) -> Response:
    status = _STATUS[type(error)]
    reason = reason_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, Denied):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, NotReady):
        headers["Retry-After"] = f"{error.retry_s:g}"
    elif path.startswith(_DATA_PLANE_PREFIX) and status < 500:
        headers |= _FINAL | {"X-Baseten-Error-Code": reason.lower()}
    field = error.field if isinstance(error, BadRequest) else None
    return JSONResponse(body_of(str(error), reason, field), status, headers)


def install(app: FastAPI) -> None:
    """Teach ``app`` to answer every error in our shape."""

    async def selfloop_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, SelfloopError)
        return response_of(error, request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return response_of(BadRequest("body", "valid JSON"), request.url.path)
        location = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        field = ".".join(location) or "body"
        return response_of(BadRequest(field, str(first["msg"])), request.url.path)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # What goes wrong while FastAPI reads a body comes as the cause of a plain 400.
        if isinstance(error.__cause__, SelfloopError):
            return response_of(error.__cause__, request.url.path)
        if error.status_code == 400:
            return response_of(BadRequest("body", "JSON that is not nested too deeply"), request.url.path)
        reason = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "HTTP_ERROR")
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        if request.url.path.startswith(_DATA_PLANE_PREFIX):
            headers |= _FINAL | {"X-Baseten-Error-Code": reason.lower()}
        return JSONResponse(body_of(message, reason), error.status_code, headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(body_of("internal error; the server's log has the cause", "INTERNAL"), 500)

    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]] = [
        (SelfloopError, selfloop_error),
        (RequestValidationError, invalid),
        (HTTPException, http_error),
        (Exception, unexpected),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
