"""Identifiers: seven lowercase letters and digits, as the hosted API hands them out."""

import re
import secrets
from typing import NewType

RunId = NewType("RunId", str)

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_ID_LENGTH = 7
_ID = re.compile(rf"[{_ALPHABET}]{{{_ID_LENGTH}}}")


def new_id() -> str:
    """A random identifier (36 bits); a collision is caught by the primary key it goes into."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of an identifier that :func:`new_id` makes."""
    return _ID.fullmatch(text) is not None
