"""The error tree as HTTP. One shape that every Loops client reads; the data plane differs where it must."""

import logging
import re
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from selfloop.control.data_dir.transient_errors import TRANSIENT_ERRORS, not_ready
from selfloop.types.errors import (
    MODEL_INVALID,
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

log = logging.getLogger(__name__)

# The Loops clients take a plain 400, 404, 408 or 502 of the data plane for a server that is still starting, and
# retry for ten minutes. A 4xx that says which gateway refused it reaches the caller at once.
_DATA_PLANE_PREFIX = "/loops/"
_FINAL = {"X-Baseten-Error-Source": "06"}
# Here errors have OpenAI's shape, and what a request gets wrong is a 400.
_OPENAI_PATH = re.compile(
    r"(/loops/samplers/[^/]+/(sync/)?|/oai/api/)(v1/.*|tokenize|detokenize|tokenizer_info)", re.DOTALL
)
# Here they have Anthropic's.
_ANTHROPIC_PREFIX = "/anthropic/api/"
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
# Here a refusal before the query is read has GraphQL's.
GRAPHQL_PATH = "/graphql/"
_BASES = (
    "/v1/loops and /v1 (management), /loops/runs and /loops/samplers (Loops), /api/v1 (Tinker), /oai/api/v1 and "
    "/loops/samplers/<id>/v1 (OpenAI), /anthropic/api/v1 (Anthropic), /graphql/ (truss), /hf (tokenizers), /healthz, "
    "/metrics; /openapi.json has every route"
)
# By then whoever keeps the model's memory may have ended, and the load is tried again.
_LOAD_AGAIN_S = 10
_NO_MODEL_NOW = frozenset({"LoadFailed", "ModelMissing", "PrepareFailed"})
# Nobody reads it; the status that proxies log when a client goes away.
_CLIENT_CLOSED_REQUEST = 499

_STATUS: dict[type[SelfloopError], int] = {
    BadRequest: 422,
    Denied: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    NotReady: 408,
    Unavailable: 503,
    RateLimited: 429,
    OperationFailed: 500,
    CheckpointDamaged: 409,
    WorkerLost: 500,
}


def _as_seen(error: SelfloopError) -> SelfloopError:
    """A model that can never be loaded is a wrong one to ask for: no client should try it again."""
    if isinstance(error, OperationFailed) and error.error_class == MODEL_INVALID:
        return BadRequest("model", f"one that can be loaded: {error}", reason="MODEL_INVALID")
    return error


def _as_seen_by_chat_clients(error: SelfloopError) -> SelfloopError:
    """So is, to a client that has no run to look at, one that cannot be had now no fault inside the server."""
    if isinstance(error, OperationFailed) and error.error_class in _NO_MODEL_NOW:
        return Unavailable(str(error), retry_s=_LOAD_AGAIN_S)
    return _as_seen(error)


def reason_of(error: SelfloopError) -> str:
    """A stable code for the kind of error, e.g. ``NOT_FOUND``."""
    if error.reason is not None:
        return error.reason
    name = type(error).__name__
    return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(name)).upper()


def body_of(message: str, reason: str, field: str | None = None) -> dict[str, object]:
    """The error body: ``message`` and ``detail`` for people, ``details.reason`` for programs."""
    details: dict[str, object] = {"reason": reason}
    if field is not None:
        details["field"] = field
    return {"code": reason, "message": message, "detail": message, "details": details}


def openai_body(status: int, message: str, reason: str, field: str | None = None) -> dict[str, object]:
    """The error body in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": reason.lower()}}


def openai_body_of(error: SelfloopError) -> dict[str, object]:
    """The error in OpenAI's shape, as a body or as an event of a stream that has begun."""
    error = _as_seen_by_chat_clients(error)
    reason, field = reason_of(error), None
    if isinstance(error, BadRequest):
        field = error.field
    elif isinstance(error, NotFound):
        reason, field = f"{error.kind}_not_found", error.kind
    elif isinstance(error, Denied):
        reason = "invalid_api_key"
    return openai_body(_STATUS[type(error)], str(error), reason, field)


def anthropic_body(status: int, message: str) -> dict[str, object]:
    """The error body in Anthropic's shape: ``{"type": "error", "error": {"type", "message"}}``."""
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def anthropic_body_of(error: SelfloopError) -> dict[str, object]:
    """The error in Anthropic's shape, as a body or as an event of a stream that has begun."""
    error = _as_seen_by_chat_clients(error)
    return anthropic_body(_anthropic_status(error), str(error))


def _anthropic_status(error: SelfloopError) -> int:
    if isinstance(error, NotReady) and not isinstance(error, RateLimited):
        return 529
    return 400 if isinstance(error, BadRequest) else _STATUS[type(error)]


def graphql_extensions(error: SelfloopError) -> dict[str, object]:
    """What GraphQL's shape of an error has beside the message."""
    details = body_of(str(error), reason_of(error), error.field if isinstance(error, BadRequest) else None)
    return {"code": details["code"], "details": details["details"]}


def response_of(error: SelfloopError, path: str) -> Response:
    """The error in the shape of the dialect that ``path`` belongs to."""
    is_chat = path.startswith(_ANTHROPIC_PREFIX) or _OPENAI_PATH.fullmatch(path)
    error = _as_seen_by_chat_clients(error) if is_chat else _as_seen(error)
    status = _STATUS[type(error)]
    is_sampled_openly = _OPENAI_PATH.fullmatch(path) and isinstance(error, RateLimited)
    if isinstance(error, Unavailable | RateLimited) and path.startswith(_DATA_PLANE_PREFIX) and not is_sampled_openly:
        # To these clients a 503 is the end of a server, a 429 that of the script, and a 408 a reason to ask again.
        status = _STATUS[NotReady]
    reason = reason_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, Denied):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, NotReady):
        headers["Retry-After"] = f"{error.retry_s:g}"
    elif path.startswith(_DATA_PLANE_PREFIX) and status < 500:
        headers |= _FINAL | {"X-Baseten-Error-Code": reason.lower()}
    # These clients repeat a conflict unless they are told not to.
    again = {"x-should-retry": "false"} if isinstance(error, Conflict | CheckpointDamaged) else {}
    if path.startswith(_ANTHROPIC_PREFIX):
        return JSONResponse(anthropic_body_of(error), _anthropic_status(error), headers | again)
    if _OPENAI_PATH.fullmatch(path):
        status = 400 if isinstance(error, BadRequest) else status
        return JSONResponse(openai_body_of(error), status, headers | again)
    if path == GRAPHQL_PATH:
        shown = {"message": str(error), "extensions": graphql_extensions(error)}
        return JSONResponse({"data": None, "errors": [shown]}, status, headers)
    field = error.field if isinstance(error, BadRequest) else None
    return JSONResponse(body_of(str(error), reason, field), status, headers)


def body_for(path: str, status: int, message: str, reason: str) -> dict[str, object]:
    """The body of an error that has no class of ours, in the shape of the dialect that ``path`` belongs to."""
    if path.startswith(_ANTHROPIC_PREFIX):
        return anthropic_body(status, message)
    return openai_body(status, message, reason) if _OPENAI_PATH.fullmatch(path) else body_of(message, reason)


def _answer(request: Request, status: int, message: str, reason: str, headers: dict[str, str]) -> Response:
    return JSONResponse(body_for(request.url.path, status, message, reason), status, headers)


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
        if isinstance(error.__cause__, UnicodeDecodeError):
            return response_of(BadRequest("body", f"JSON in UTF-8 ({error.__cause__.reason})"), request.url.path)
        if error.status_code == 400:
            return response_of(BadRequest("body", "JSON that is not nested too deeply"), request.url.path)
        reason = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "HTTP_ERROR")
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        if error.status_code == 404:
            message += f"; there is {_BASES}"
        headers = dict(error.headers or {})
        if request.url.path.startswith(_DATA_PLANE_PREFIX):
            headers |= _FINAL | {"X-Baseten-Error-Code": reason.lower()}
        return _answer(request, error.status_code, message, reason, headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return _answer(request, 500, "internal error; the server's log has the cause", "INTERNAL", {})

    async def transient_error(request: Request, error: Exception) -> Response:
        told = not_ready(error)
        if told is None:
            return await unexpected(request, error)
        log.warning("%s %s: %s", request.method, request.url.path, told)
        return response_of(told, request.url.path)

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[Response]]]] = [
        (SelfloopError, selfloop_error),
        (RequestValidationError, invalid),
        (HTTPException, http_error),
        (ClientDisconnect, gone),
        *((kind, transient_error) for kind in TRANSIENT_ERRORS),
        (Exception, unexpected),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
