"""Bring a database to this version's schema."""

from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.engine import URL

from selfloop.storage.db.address import is_sqlite, shown
from selfloop.storage.db.backend import backend_of

_MIGRATIONS = Path(__file__).parent / "migrations"


class NewerDatabase(Exception):
    """The database was written by a newer version of Selfloop."""


def upgrade(database: URL) -> None:
    """Create or migrate ``database``. Raises :class:`NewerDatabase` rather than touching a newer one."""
    match schema_of(database):
        case "current":
            return
        case "newer":
            raise NewerDatabase(
                f"{shown(database)} has schema {_current_revision(database)}, which this version does not know: it was "
                "written by a newer Selfloop. Upgrade Selfloop, or choose another --data-dir."
            )
        case "absent" | "older":
            command.upgrade(_config(database), "head")


def schema_of(database: URL) -> Literal["absent", "older", "current", "newer"]:
    """How the schema of ``database`` compares with this version's; changes nothing."""
    current = _current_revision(database)
    if current is None:
        return "absent"
    script = ScriptDirectory.from_config(_config(database))
    if current == script.get_current_head():
        return "current"
    return "older" if current in {r.revision for r in script.walk_revisions()} else "newer"


def _config(database: URL) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["database"] = database
    return config


def _current_revision(database: URL) -> str | None:
    if is_sqlite(database) and not Path(str(database.database)).exists():
        return None
    engine = backend_of(database).engine(pool_size=1)
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    finally:
        engine.dispose()
