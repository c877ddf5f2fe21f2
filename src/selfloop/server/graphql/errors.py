"""Errors as GraphQL's clients read them."""

from selfloop.server.shared.errors import ErrorShape
from selfloop.types.errors import SelfloopError


class _GraphQlErrors(ErrorShape):
    """A refusal before the query is read has the shape of its errors, without data."""

    def body(self, error: SelfloopError) -> dict[str, object]:
        return {"data": None, "errors": [{"message": str(error), "extensions": self.extensions(error)}]}

    def extensions(self, error: SelfloopError) -> dict[str, object]:
        """What an error has beside its message."""
        own = super().body(error)
        return {"code": own["code"], "details": own["details"]}


ERRORS = _GraphQlErrors()
