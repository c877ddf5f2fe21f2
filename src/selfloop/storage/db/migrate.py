"""Bring a data directory's database to this version's schema."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

_MIGRATIONS = Path(__file__).parent / "migrations"


class NewerDatabase(Exception):
    """The database was written by a newer version of Selfloop."""


def upgrade(database: Path) -> None:
    """Create or migrate ``database``. Raises :class:`NewerDatabase` rather than touching a newer one."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["database"] = database
    script = ScriptDirectory.from_config(config)
    current = _current_revision(database)
    if current == script.get_current_head():
        return
    if current is not None and current not in {r.revision for r in script.walk_revisions()}:
        raise NewerDatabase(
            f"{database} has schema {current}, which this version does not know: it was written by a newer "
            "Selfloop. Upgrade Selfloop, or choose another --data-dir."
        )
    command.upgrade(config, "head")


def _current_revision(database: Path) -> str | None:
    if not database.exists():
        return None
    engine = create_engine(f"sqlite:///{database}")
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    finally:
        engine.dispose()
