"""Columns that mean the same on every database."""

from typing import Any

from sqlalchemy import BigInteger, Dialect, Integer, String
from sqlalchemy.types import TypeDecorator

Whole = BigInteger().with_variant(Integer(), "sqlite")
"""A whole number of 64 bits. SQLite has one kind, and counts up only what is called INTEGER."""

# PostgreSQL's text has every character but NUL. It is kept as two others, of Unicode's private use.
_MARK, _NUL = "\ue000", "\x00"


class Text(TypeDecorator[str]):
    """Any string."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or dialect.name == "sqlite":
            return value
        return value.replace(_MARK, _MARK + "1").replace(_NUL, _MARK + "0")

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        if value is None or dialect.name == "sqlite" or _MARK not in value:
            return value
        return value.replace(_MARK + "0", _NUL).replace(_MARK + "1", _MARK)
