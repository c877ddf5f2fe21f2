"""All rows of a database into another that is empty, in one transaction of it."""

import hashlib
import logging
from collections.abc import Callable

from sqlalchemy import Connection, Table, func, insert, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from selfloop.storage.db.address import shown
from selfloop.storage.db.backend import IMMEDIATE, backend_of, reached
from selfloop.storage.db.database import Database
from selfloop.storage.db.migrate import CannotMigrate, schema_of, upgrade
from selfloop.storage.db.tables import Base
from selfloop.types.errors import Conflict

log = logging.getLogger(__name__)

_CHUNK_ROWS = 500
_VERSION_TABLE = "alembic_version"

OnTable = Callable[[str, float], None]
"""Called with the table that is being copied, and which part of all tables lies behind."""


def prepare(target: Database) -> None:
    """Bring an empty target to this version's schema.

    Raises:
        Conflict: there is a table that is not ours, or there are rows in tables of another schema.
        Unavailable: it cannot be reached.
    """
    engine = backend_of(target.url).engine(pool_size=1)
    try:
        with reached(target.url), engine.connect() as connection:
            filled = _filled_table(connection, shown(target.url))
    finally:
        engine.dispose()
    if filled is None:
        upgrade(target.url)
    elif schema_of(target.url) != "current":
        raise _not_empty(target, filled)


def copy_rows(source: Database, target: Database, on_table: OnTable) -> int:
    """Copy every row; both have this version's schema. Returns how many they are.

    A target that has these very rows is left as it is: an earlier call came so far. Nobody else writes meanwhile: the
    transactions hold both databases' writers off.

    Raises:
        Conflict: the target has other rows.
        CannotMigrate: a row could not be written. Nothing was.
    """
    engine = backend_of(source.url).engine(pool_size=1)

    def work(into: Connection) -> int:
        filled = _filled_table(into, shown(target.url))
        with engine.connect().execution_options(**{IMMEDIATE: True}) as rows, rows.begin():
            if filled is None:
                return _each_table(lambda table: copy_table(rows, into, table), on_table)
            if all(_digests(rows, table) == _digests(into, table) for table in Base.metadata.sorted_tables):
                return _each_table(lambda table: _num_rows(rows, table), on_table)
        raise _not_empty(target, filled)

    try:
        return target.in_transaction(work)
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", error)).strip()
        raise CannotMigrate(f"the rows cannot be written to {shown(target.url)}; nothing was: {cause}") from error
    finally:
        engine.dispose()


def _filled_table(connection: Connection, address: str) -> str | None:
    """A table of ours that has rows. Raises :class:`Conflict` where there is one that is not ours."""
    there, ours = set(inspect(connection).get_table_names()), Base.metadata.tables
    if foreign := sorted(there - {*ours, _VERSION_TABLE}):
        raise Conflict(f"{address} is not empty: it has a table {foreign[0]!r} that is not Selfloop's")
    for name in sorted(there & set(ours)):
        if connection.execute(select(text("1")).select_from(ours[name]).limit(1)).first() is not None:
            return name
    return None


def _not_empty(target: Database, filled: str) -> Conflict:
    return Conflict(f"{shown(target.url)} is not empty: it has {filled} already; name a database without rows")


def _each_table(num_rows_of: Callable[[Table], int], on_table: OnTable) -> int:
    tables = Base.metadata.sorted_tables
    num_rows = 0
    for place, table in enumerate(tables):
        on_table(table.name, place / len(tables))
        num_rows += num_rows_of(table)
    return num_rows


def _digests(connection: Connection, table: Table) -> set[bytes]:
    """Of each row, as its values are in Python, which does not depend on the kind of database."""
    rows = connection.execution_options(yield_per=_CHUNK_ROWS).execute(select(table))
    return {hashlib.sha256(repr(tuple(row)).encode("utf-8", "surrogatepass")).digest() for row in rows}


def _num_rows(connection: Connection, table: Table) -> int:
    return connection.execute(select(func.count()).select_from(table)).scalar_one()


def copy_table(source: Connection, target: Connection, table: Table) -> int:
    """Copy all rows of a table to one that is empty; returns how many there are."""
    num_rows = 0
    for chunk in source.execution_options(yield_per=_CHUNK_ROWS).execute(select(table)).mappings().partitions():
        target.execute(insert(table), [dict(row) for row in chunk])
        num_rows += len(chunk)
    counted = table.autoincrement_column
    if counted is not None and num_rows and target.dialect.name == "postgresql":
        # New rows are counted on from here.
        counter = func.pg_get_serial_sequence(table.name, counted.name)
        target.execute(select(func.setval(counter, select(func.max(counted)).scalar_subquery())))
    log.info("%s: %d rows", table.name, num_rows)
    return num_rows
