"""Errors as OpenAI's clients, and vLLM's, read them."""

from selfloop.server.shared.errors import ChatErrorShape, final, reason_of
from selfloop.types.errors import BadRequest, Denied, NotFound, NotReady, SelfloopError, Unavailable

_DATA_PLANE = "/loops/"


class _OpenAiErrors(ChatErrorShape):
    """``{"error": {"message", "type", "param", "code"}}``; what a request gets wrong is a 400.

    Below a sampler, Loops clients ask too, which need the headers of the data plane and a 408 to ask again.
    """

    def status(self, error: SelfloopError, path: str) -> int:
        if isinstance(error, BadRequest):
            return 400
        if isinstance(error, Unavailable) and path.startswith(_DATA_PLANE):
            return 408
        return super().status(error, path)

    def headers(self, error: SelfloopError, path: str) -> dict[str, str]:
        headers = super().headers(error, path)
        if isinstance(error, NotReady) or self.status(error, path) >= 500:
            return headers
        return headers | self.plain_headers(reason_of(error), path)

    def body(self, error: SelfloopError) -> dict[str, object]:
        """Also an event of a stream that has begun."""
        error = self.seen(error)
        reason, field = reason_of(error), None
        if isinstance(error, BadRequest):
            field = error.field
        elif isinstance(error, NotFound):
            reason, field = f"{error.kind}_not_found", error.kind
        elif isinstance(error, Denied):
            reason = "invalid_api_key"
        return _body(super().status(error, ""), str(error), reason, field)

    def plain_headers(self, reason: str, path: str) -> dict[str, str]:
        return final(reason) if path.startswith(_DATA_PLANE) else {}

    def plain_body(self, status: int, message: str, reason: str) -> dict[str, object]:
        return _body(status, message, reason, None)


def _body(status: int, message: str, reason: str, field: str | None) -> dict[str, object]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": reason.lower()}}


ERRORS = _OpenAiErrors()
