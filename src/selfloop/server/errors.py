"""Every error of the application, answered in the shape of the request's dialect."""

import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from selfloop.control.data_dir.transient_errors import TRANSIENT_ERRORS, not_ready
from selfloop.server.shared.dialect import Dialects, dialect_of
from selfloop.types.errors import BadRequest, SelfloopError

log = logging.getLogger(__name__)

# Nobody reads it; the status that proxies log when a client goes away.
_CLIENT_CLOSED_REQUEST = 499


def _response(request: Request, error: SelfloopError) -> Response:
    return dialect_of(request.scope).errors.response(error, request.url.path)


def _plain(request: Request, status: int, message: str, reason: str, headers: dict[str, str]) -> Response:
    return JSONResponse(dialect_of(request.scope).errors.plain_body(status, message, reason), status, headers)


def install(app: FastAPI, dialects: Dialects) -> None:
    """Teach ``app`` to answer every error in its dialect's shape."""
    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]] = [
        (SelfloopError, _selfloop_error),
        (RequestValidationError, _invalid),
        (HTTPException, _http_error),
        (ClientDisconnect, _gone),
        *((kind, _transient_error) for kind in TRANSIENT_ERRORS),
        (Exception, _unexpected),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
    app.state.dialects = dialects


async def _selfloop_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SelfloopError)
    return _response(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _response(request, BadRequest("body", "valid JSON"))
    location = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    invalid = BadRequest(".".join(location) or "body", str(first["msg"]))
    return dialect_of(request.scope).errors.invalid_parameter(invalid, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # What goes wrong while FastAPI reads a body comes as the cause of a plain 400.
    if isinstance(error.__cause__, SelfloopError):
        return _response(request, error.__cause__)
    if isinstance(error.__cause__, UnicodeDecodeError):
        return _response(request, BadRequest("body", f"JSON in UTF-8 ({error.__cause__.reason})"))
    if error.status_code == 400:
        return _response(request, BadRequest("body", "JSON that is not nested too deeply"))
    reason = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "HTTP_ERROR")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    if error.status_code == 404:
        message += f"; there is {request.app.state.dialects.bases}; /openapi.json has every route"
    headers = dialect_of(request.scope).errors.plain_headers(reason, request.url.path)
    return _plain(request, error.status_code, message, reason, dict(error.headers or {}) | headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    return _plain(request, 500, "internal error; the server's log has the cause", "INTERNAL", {})


async def _transient_error(request: Request, error: Exception) -> Response:
    later = not_ready(error)
    if later is None:
        return await _unexpected(request, error)
    log.warning("%s %s: %s", request.method, request.url.path, later)
    return dialect_of(request.scope).errors.outage(later, request.url.path)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)
