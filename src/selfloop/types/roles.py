"""What a key may do in its team."""

from enum import StrEnum

from selfloop.types.errors import BadRequest


class Role(StrEnum):
    """``ADMIN`` also makes and revokes the team's keys; ``READ_ONLY`` lists, downloads and watches."""

    ADMIN = "admin"
    MEMBER = "member"
    READ_ONLY = "read-only"


def parse_role(text: str, field: str = "role") -> Role:
    """Raises :class:`BadRequest` naming ``field`` for a word that is no role."""
    if text not in list(Role):
        raise BadRequest(field, f"one of {', '.join(Role)}; got {text[:100]!r}")
    return Role(text)
