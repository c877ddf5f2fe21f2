"""Expressions that each database writes in its own way."""

from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Integer, Text, cast, func
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class json_text(FunctionElement[str]):
    """``json_text(column, key)``: what a JSON object (as text) has under a key, as text; null without one."""

    type = Text()
    inherit_cache = True


@compiles(json_text, "sqlite")
def _json_text_sqlite(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = element.clauses
    return f"({compiler.process(column, **kw)} ->> {compiler.process(key, **kw)})"


@compiles(json_text, "postgresql")
def _json_text_postgresql(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    column, key = element.clauses
    return f"(CAST({compiler.process(column, **kw)} AS json) ->> {compiler.process(cast(key, Text), **kw)})"


def total(column: Any) -> ColumnElement[int]:
    """The sum of whole numbers as one; PostgreSQL would make it a decimal."""
    return cast(func.sum(column), BigInteger().with_variant(Integer(), "sqlite"))


def insert_or_update(session: AsyncSession, table: Any) -> Any:
    """An ``INSERT`` that takes ``on_conflict_do_update``; both databases write it alike."""
    dialect = session.get_bind().dialect.name
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
