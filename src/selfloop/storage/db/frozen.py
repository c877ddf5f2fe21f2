"""One state of all rows, while a server goes on writing: which files it names, and a copy of it in a file."""

import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, select, text
from sqlalchemy.engine import URL

from selfloop.storage.db import migrate
from selfloop.storage.db.address import is_sqlite, sqlite_url
from selfloop.storage.db.backend import IMMEDIATE, backend_of, reached
from selfloop.storage.db.move import copy_table
from selfloop.storage.db.tables import Base, CheckpointRow, ModelRow, PinnedCheckpointRow, RunRow
from selfloop.types.errors import SelfloopError
from selfloop.types.status import RunStatus

# Columns of this ending hold keys of blobs, but for this one.
_BLOB_KEY = "_key"
_NO_BLOB = frozenset({"copy_key"})


class Damaged(SelfloopError):
    """A file of rows is not what was written."""


class Named(NamedTuple):
    """What rows name: keys of blobs, ids of checkpoints, (sampler, checkpoint) of held ones, paths of models."""

    keys: set[str]
    checkpoints: set[str]
    held: set[tuple[str, str]]
    models: dict[str, str]


@contextmanager
def frozen(url: URL) -> Generator[Connection]:
    """A connection that sees one state of the database, whatever is written meanwhile. Nobody waits for it."""
    engine = backend_of(url).engine(pool_size=1)
    try:
        with reached(url), engine.connect() as connection:
            if is_sqlite(url):
                connection.exec_driver_sql("BEGIN")
            else:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            # From the first query on.
            connection.execute(text("SELECT version_num FROM alembic_version"))
            yield connection
            connection.rollback()
    finally:
        engine.dispose()


def named(connection: Connection) -> Named:
    """What the rows name that the connection sees; of a run that has ended nothing is needed any more."""
    keys: set[str] = set()
    for table in Base.metadata.sorted_tables:
        for column in table.columns:
            if column.name.endswith(_BLOB_KEY) and column.name not in _NO_BLOB:
                query = select(column).where(column.is_not(None))
                if table is RunRow.__table__:
                    query = query.where(RunRow.status == RunStatus.ACTIVE)
                keys.update(connection.scalars(query))
    held = select(PinnedCheckpointRow.sampler_id, PinnedCheckpointRow.checkpoint_id)
    models = connection.execute(select(ModelRow.name, ModelRow.path))
    return Named(
        keys,
        set(connection.scalars(select(CheckpointRow.id))),
        {(sampler_id, checkpoint_id) for sampler_id, checkpoint_id in connection.execute(held)},
        {name: path for name, path in models if path is not None},
    )


def copy_to_file(connection: Connection, file: Path) -> None:
    """Write what the connection sees to a new SQLite file of the same schema, whatever kind of database it is of."""
    if connection.dialect.name == "sqlite":
        source = connection.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        with closing(sqlite3.connect(file)) as target:
            source.backup(target)
            # One file, to be looked at where nothing may be written.
            target.execute("PRAGMA journal_mode=DELETE")
        return
    migrate.upgrade(sqlite_url(file))
    engine = backend_of(sqlite_url(file)).engine(pool_size=1)
    try:
        with engine.connect().execution_options(**{IMMEDIATE: True}) as target, target.begin():
            for table in Base.metadata.sorted_tables:
                copy_table(connection, target, table)
        with engine.connect() as target:
            target.exec_driver_sql("PRAGMA journal_mode=DELETE")
    finally:
        engine.dispose()


def check_file(file: Path) -> None:
    """Have SQLite look through a file that nobody writes. Raises :class:`Damaged`."""
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as connection:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise Damaged(f"{file} is damaged: {found}")
