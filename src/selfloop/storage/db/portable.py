"""Expressions that each database writes in its own way."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Connection, Integer, cast, func, literal
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from selfloop.storage.db.column_types import Text

T = TypeVar("T")

_MAX_NAMED = 500

SQLITE_JSON_TEXT = "selfloop_json_text"
"""Our own :func:`member` on connections to SQLite, whose ``->>`` takes some keys for paths, and fails on others."""


def member(document: str | None, key: str) -> str | None:
    """What a JSON object has under a key, as text; None without one."""
    value = None if document is None else msgspec.json.decode(document)
    found = value.get(key) if isinstance(value, dict) else None
    return found if found is None or isinstance(found, str) else msgspec.json.encode(found).decode()


def json_text(document: Any, key: str) -> ColumnElement[str]:
    """The same in a query: of a column that is :class:`JsonText`, or of what this gave out."""
    return _JsonText(document, literal(key, Text()))


class _JsonText(FunctionElement[str]):
    type = Text()
    inherit_cache = True


@compiles(_JsonText, "sqlite")
def _json_text_sqlite(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = element.clauses
    return f"{SQLITE_JSON_TEXT}({compiler.process(column, **kw)}, {compiler.process(key, **kw)})"


@compiles(_JsonText, "postgresql")
def _json_text_postgresql(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = element.clauses
    return f"(CAST({compiler.process(column, **kw)} AS json) ->> {compiler.process(cast(key, Text), **kw)})"


def total(column: Any) -> ColumnElement[int]:
    """The sum of whole numbers as one; PostgreSQL would make it a decimal."""
    return cast(func.sum(column), BigInteger().with_variant(Integer(), "sqlite"))


def insert_or_update(session: AsyncSession | Connection, table: Any) -> Any:
    """An ``INSERT`` that takes ``on_conflict_do_update`` and ``_nothing``; both databases write it alike."""
    dialect = session.dialect if isinstance(session, Connection) else session.get_bind().dialect
    return postgresql.insert(table) if dialect.name == "postgresql" else sqlite.insert(table)


def batched(values: Sequence[T]) -> Iterator[list[T]]:
    """As many of them at a time as a query may name."""
    for first in range(0, len(values), _MAX_NAMED):
        yield list(values[first : first + _MAX_NAMED])
