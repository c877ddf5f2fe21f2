"""All rows of a database into another that is empty, in one transaction of it."""

import logging
from collections.abc import Callable

from sqlalchemy import Connection, Table, func, insert, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from selfloop.storage.db.address import shown
from selfloop.storage.db.backend import IMMEDIATE, backend_of, reached
from selfloop.storage.db.database import Database
from selfloop.storage.db.migrate import CannotMigrate
from selfloop.storage.db.tables import Base
from selfloop.types.errors import Conflict

log = logging.getLogger(__name__)

_CHUNK_ROWS = 500
_VERSION_TABLE = "alembic_version"

OnTable = Callable[[str, float], None]
"""Told the table that is being copied, and which part of all tables lies behind."""


def check_is_empty(target: Database) -> None:
    """Raises :class:`Conflict` where there is anything but tables of ours without rows."""
    engine = backend_of(target.url).engine(pool_size=1)
    try:
        with reached(target.url), engine.connect() as connection:
            _check_is_empty(connection, shown(target.url))
    finally:
        engine.dispose()


def copy_rows(source: Database, target: Database, on_table: OnTable) -> int:
    """Copy every row; both have this version's schema. Returns how many they are.

    Nobody else writes meanwhile: the transactions hold both databases' writers off.

    Raises:
        Conflict: the target is not empty.
        CannotMigrate: a row could not be written. Nothing was.
    """
    engine = backend_of(source.url).engine(pool_size=1)

    def work(into: Connection) -> int:
        _check_is_empty(into, shown(target.url))
        with engine.connect().execution_options(**{IMMEDIATE: True}) as rows, rows.begin():
            return _copy_tables(rows, into, on_table)

    try:
        return target.in_transaction(work)
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", error)).strip()
        raise CannotMigrate(f"the rows cannot be written to {shown(target.url)}; nothing was: {cause}") from error
    finally:
        engine.dispose()


def _check_is_empty(connection: Connection, address: str) -> None:
    there, ours = set(inspect(connection).get_table_names()), Base.metadata.tables
    if foreign := sorted(there - {*ours, _VERSION_TABLE}):
        raise Conflict(f"{address} is not empty: it has a table {foreign[0]!r} that is not Selfloop's")
    for name in sorted(there & set(ours)):
        if connection.execute(select(text("1")).select_from(ours[name]).limit(1)).first() is not None:
            raise Conflict(f"{address} is not empty: it has {name} already; name a database without rows")


def _copy_tables(source: Connection, target: Connection, on_table: OnTable) -> int:
    tables = Base.metadata.sorted_tables
    num_rows = 0
    for place, table in enumerate(tables):
        on_table(table.name, place / len(tables))
        num_rows += _copy_table(source, target, table)
    return num_rows


def _copy_table(source: Connection, target: Connection, table: Table) -> int:
    num_rows = 0
    for chunk in source.execution_options(yield_per=_CHUNK_ROWS).execute(select(table)).mappings().partitions():
        target.execute(insert(table), [dict(row) for row in chunk])
        num_rows += len(chunk)
    counted = table.autoincrement_column
    if counted is not None and num_rows:
        # New rows are counted on from here.
        counter = func.pg_get_serial_sequence(table.name, counted.name)
        target.execute(select(func.setval(counter, select(func.max(counted)).scalar_subquery())))
    log.info("%s: %d rows", table.name, num_rows)
    return num_rows
