"""Bring a database to this version's schema."""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import inspect, text
from sqlalchemy.engine import URL

from selfloop.storage.db.address import is_sqlite, shown
from selfloop.storage.db.backend import backend_of, reached
from selfloop.types.errors import SelfloopError

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger(__name__)
# It logs each of its parts, and every step.
logging.getLogger("alembic").setLevel(logging.WARNING)

_MIGRATIONS = Path(__file__).parent / "migrations"


class CannotMigrate(SelfloopError):
    """The database cannot be used by this version, and nothing of it was changed."""


class NewerDatabase(CannotMigrate):
    """The database was written by a newer version of Selfloop."""


def upgrade(database: URL) -> None:
    """Create or migrate ``database``, in one transaction; a file is copied beside itself before.

    Raises:
        CannotMigrate: it is newer, or there is no room for the copy.
        Unavailable: it cannot be reached.
    """
    match schema_of(database):
        case "current":
            return
        case "newer":
            raise NewerDatabase(
                f"{shown(database)} has schema {_current_revision(database)}, which this version does not know: it was "
                "written by a newer Selfloop. Upgrade Selfloop, or choose another --data-dir."
            )
        case "absent":
            _to_head(database)
        case "older":
            if is_sqlite(database):
                _back_up(Path(str(database.database)), str(_current_revision(database)))
            log.info("%s is brought up to date with this version", shown(database))
            _to_head(database)


def backup_path(file: Path, revision: str) -> Path:
    """Where the copy of ``file`` at an older schema lies after a migration."""
    return file.with_name(f"{file.name}.schema-{revision}")


def _back_up(file: Path, revision: str) -> None:
    aside = backup_path(file, revision)
    part = aside.with_name(aside.name + ".part")
    try:
        # The library's own copy: it has what lies in the write-ahead log, too.
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(part)) as target:
            source.backup(target)
    except sqlite3.OperationalError as error:
        part.unlink(missing_ok=True)
        raise CannotMigrate(f"{file} is to be migrated, and cannot be copied before: {error}") from error
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    part.replace(aside)
    part.with_name(part.name + "-journal").unlink(missing_ok=True)


def schema_of(database: URL) -> Literal["absent", "older", "current", "newer"]:
    """How the schema of ``database`` compares with this version's; changes nothing. Raises :class:`Unavailable`."""
    current = _current_revision(database)
    if current is None:
        return "absent"
    known = revisions()
    if current == known[-1]:
        return "current"
    return "older" if current in known else "newer"


def revisions() -> list[str]:
    """Of every schema there was, in order: what the files of the migrations begin with."""
    return sorted(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*_*.py"))


# Alembic is not imported with the module: a start with nothing to migrate is the faster for it.


def _to_head(database: URL) -> None:
    from alembic import command

    command.upgrade(_config(database), "head")


def _config(database: URL) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["database"] = database
    return config


def _current_revision(database: URL) -> str | None:
    if is_sqlite(database) and not Path(str(database.database)).exists():
        return None
    engine = backend_of(database).engine(pool_size=1)
    try:
        with reached(database), engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    finally:
        engine.dispose()
