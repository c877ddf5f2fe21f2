"""Errors of the data plane as the Loops clients take them."""

from selfloop.server.shared.errors import ErrorShape, final, reason_of
from selfloop.types.errors import NotReady, SelfloopError


class _LoopsErrors(ErrorShape):
    """The server's own shape. Whatever is final says so, and whatever passes is a 408.

    To these clients a 503 is the end of a server, a 429 that of the script, and a 408 a reason to ask again.
    """

    def status(self, error: SelfloopError, path: str) -> int:
        return 408 if isinstance(error, NotReady) else super().status(error, path)

    def headers(self, error: SelfloopError, path: str) -> dict[str, str]:
        headers = super().headers(error, path)
        is_final = not isinstance(error, NotReady) and self.status(error, path) < 500
        return headers | final(reason_of(error)) if is_final else headers

    def plain_headers(self, reason: str, path: str) -> dict[str, str]:
        return final(reason)


ERRORS = _LoopsErrors()
