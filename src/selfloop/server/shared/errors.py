"""The shape in which errors are answered: the server's own, which a dialect narrows where its clients read another."""

from starlette.responses import JSONResponse, Response

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

# By then whoever keeps the model's memory may have ended, and the load is tried again.
_LOAD_AGAIN_S = 10
_NO_MODEL_NOW = frozenset({"LoadFailed", "ModelMissing", "PrepareFailed"})

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


class ErrorShape:
    """The status, headers and body of each error. Whatever a dialect answers otherwise, it overrides."""

    def seen(self, error: SelfloopError) -> SelfloopError:
        """The error as a client should take it: a model that can never be loaded is a wrong one to ask for."""
        if isinstance(error, OperationFailed) and error.error_class == MODEL_INVALID:
            return BadRequest("model", f"one that can be loaded: {error}", reason="MODEL_INVALID")
        return error

    def status(self, error: SelfloopError, path: str) -> int:
        return _STATUS[type(error)]

    def headers(self, error: SelfloopError, path: str) -> dict[str, str]:
        if isinstance(error, Denied):
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": f"{error.retry_s:g}"} if isinstance(error, NotReady) else {}

    def body(self, error: SelfloopError) -> dict[str, object]:
        return body_of(str(error), reason_of(error), error.field if isinstance(error, BadRequest) else None)

    def response(self, error: SelfloopError, path: str) -> Response:
        """The answer to a request for ``path`` that ended in ``error``."""
        error = self.seen(error)
        return JSONResponse(self.body(error), self.status(error, path), self.headers(error, path))

    def invalid_parameter(self, error: BadRequest, path: str) -> Response:
        """The answer where the framework found a parameter of a path, a query or a header to be of another type."""
        return self.response(error, path)

    def outage(self, error: NotReady, path: str) -> Response:
        """The answer to a request that met an outage of the disk or the database: nothing of it was accepted."""
        return self.response(error, path)

    def plain_headers(self, reason: str, path: str) -> dict[str, str]:
        """Headers of an error that has no class of ours: no such route, or no such method of it."""
        return {}

    def plain_body(self, status: int, message: str, reason: str) -> dict[str, object]:
        """The body of an error that has no class of ours."""
        return body_of(message, reason)


class ChatErrorShape(ErrorShape):
    """For clients that have no run to look at, and know nothing of this server's operations."""

    def seen(self, error: SelfloopError) -> SelfloopError:
        """To these, a model that cannot be had now is no fault inside the server."""
        if isinstance(error, OperationFailed) and error.error_class in _NO_MODEL_NOW:
            return Unavailable(str(error), retry_s=_LOAD_AGAIN_S)
        return super().seen(error)

    def headers(self, error: SelfloopError, path: str) -> dict[str, str]:
        # These clients repeat a conflict unless this header forbids it.
        again = {"x-should-retry": "false"} if isinstance(error, Conflict | CheckpointDamaged) else {}
        return super().headers(error, path) | again


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


def final(reason: str) -> dict[str, str]:
    """Headers that say to a client of the data plane that this gateway refused the request, and that it is final.

    The Loops clients take a plain 400, 404, 408 or 502 of the data plane for a server that is still starting, and
    retry for ten minutes. A 4xx that says which gateway refused it reaches the caller at once.
    """
    return {"X-Baseten-Error-Source": "06", "X-Baseten-Error-Code": reason.lower()}
