"""Errors as Anthropic's clients read them."""

from selfloop.server.shared.errors import ChatErrorShape
from selfloop.types.errors import BadRequest, NotReady, RateLimited, SelfloopError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class _AnthropicErrors(ChatErrorShape):
    """``{"type": "error", "error": {"type", "message"}}``; a server that is not ready is overloaded."""

    def status(self, error: SelfloopError, path: str) -> int:
        if isinstance(error, NotReady) and not isinstance(error, RateLimited):
            return 529
        return 400 if isinstance(error, BadRequest) else super().status(error, path)

    def body(self, error: SelfloopError) -> dict[str, object]:
        """Also an event of a stream that has begun."""
        error = self.seen(error)
        return _body(self.status(error, ""), str(error))

    def plain_body(self, status: int, message: str, reason: str) -> dict[str, object]:
        return _body(status, message)


def _body(status: int, message: str) -> dict[str, object]:
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


ERRORS = _AnthropicErrors()
