"""Alembic's entry: run the migrations on the database that ``storage.db.migrate`` names."""

from alembic import context
from sqlalchemy import create_engine

from selfloop.storage.db.tables import Base

engine = create_engine(f"sqlite:///{context.config.attributes['database']}")
with engine.connect() as connection:
    # Batch mode rebuilds tables, which is how SQLite alters them.
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
