"""Errors as Tinker's client reads them."""

from typing import Any

from starlette.responses import JSONResponse, Response

from selfloop.server.shared.errors import ErrorShape
from selfloop.server.shared.schemas import ErrorV1
from selfloop.types.errors import (
    BadRequest,
    CheckpointDamaged,
    Conflict,
    NotFound,
    NotReady,
    OperationFailed,
    SelfloopError,
    WorkerLost,
)

_GONE = 410
_LINKS, _FOR_LINKS = "/uploads/", ErrorShape()

_STATUS: dict[type[SelfloopError], int] = {
    BadRequest: 400,
    Conflict: 400,
    NotReady: 429,
    OperationFailed: 400,
    CheckpointDamaged: 400,
    WorkerLost: 503,
}


class _TinkerErrors(ErrorShape):
    """The server's own shape. The client repeats 408, 409, 429 and 5xx for minutes, so they are for what may pass."""

    def seen(self, error: SelfloopError) -> SelfloopError:
        return error

    def status(self, error: SelfloopError, path: str) -> int:
        own = _STATUS.get(type(error))
        return super().status(error, path) if own is None else own

    def response(self, error: SelfloopError, path: str) -> Response:
        # A file is put to its link by whatever speaks HTTP, which is answered as by the server's other links.
        return (_FOR_LINKS if path.startswith(_LINKS) else super()).response(error, path)

    def invalid_parameter(self, error: BadRequest, path: str) -> Response:
        return JSONResponse(self.body(error), 422)

    def outage(self, error: NotReady, path: str) -> Response:
        return JSONResponse(self.body(error), 408, self.headers(error, path))


ERRORS = _TinkerErrors()

RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorV1, "description": "Refused, lost, or not yet"}}
"""For the OpenAPI document of each router."""


def gone(error: NotFound) -> Response:
    """For what is asked for over and over: a 410, after which the client asks no more."""
    return JSONResponse(ERRORS.body(error), _GONE)
