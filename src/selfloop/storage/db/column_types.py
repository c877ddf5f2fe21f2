"""Columns that mean the same on every database."""

import re
from typing import Any

from sqlalchemy import BigInteger, Dialect, Integer, String
from sqlalchemy.types import TypeDecorator

Whole = BigInteger().with_variant(Integer(), "sqlite")
"""A whole number of 64 bits. SQLite has one kind, and counts up only what is called INTEGER."""

# PostgreSQL's text has every character but NUL. It is kept as two others, of Unicode's private use.
_MARK, _NUL = "\ue000", "\x00"
# As JSON writes it: an escape whose backslash is not itself escaped.
_NUL_IN_JSON = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


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


class JsonText(Text):
    """A JSON document that ``portable.json_text`` looks into: its strings hold every character, too.

    PostgreSQL takes JSON's escape of NUL, but fails as soon as anything of the document is looked at.
    """

    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        stored = super().process_bind_param(value, dialect)
        return stored if stored is None or dialect.name == "sqlite" else nul_marked(stored)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        if value is None or dialect.name == "sqlite" or _MARK not in value:
            return value
        return value.replace(_MARK + "0", "\\u0000").replace(_MARK + "1", _MARK)


def nul_marked(document: str) -> str:
    """A JSON document with its escaped NULs as PostgreSQL can keep them."""
    return _NUL_IN_JSON.sub(rf"\1{_MARK}0", document)
