"""Alembic's entry: run the migrations on the database that ``storage.db.migrate`` names."""

from typing import Any

from alembic import context
from sqlalchemy import event

from selfloop.storage.db.address import is_sqlite
from selfloop.storage.db.backend import IMMEDIATE, backend_of
from selfloop.storage.db.tables import Base


def _without_foreign_keys(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=OFF")


url = context.config.attributes["database"]
engine = backend_of(url).engine(pool_size=1)
if is_sqlite(url):
    # A table that is rebuilt is dropped for a moment.
    event.listen(engine, "connect", _without_foreign_keys)
with engine.connect().execution_options(**{IMMEDIATE: True}) as connection:
    # Batch mode rebuilds tables, which is how SQLite alters them.
    # All of it or nothing, however it ends: SQLite can, though Alembic does not take it for granted.
    context.configure(
        connection=connection, target_metadata=Base.metadata, render_as_batch=True, transactional_ddl=True
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
