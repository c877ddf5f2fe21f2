"""A data directory's rows from its own file to a PostgreSQL database."""

from pathlib import Path
from typing import NamedTuple

from selfloop.control.data_dir.identity import DATABASE_FILE, DataDirIdentity, hold
from selfloop.storage.db import migrate, move
from selfloop.storage.db.address import parse_database_url, shown, sqlite_url
from selfloop.storage.db.database import Database
from selfloop.types.errors import Conflict


class Moved(NamedTuple):
    """How many rows lie where now, and the file that they came from, which nothing reads any more."""

    num_rows: int
    address: str
    left: Path


async def move_rows(data_dir: Path, database: str, on_table: move.OnTable) -> Moved:
    """Copy every row to an empty PostgreSQL database, in one transaction, and have the data directory belong to it.

    A call that was cut off is finished by another: a database that has these very rows is taken as filled.

    Raises:
        BadRequest: no address of PostgreSQL.
        Conflict: a server runs on either, the target has other rows already, or there is no file to move.
        CannotMigrate: the rows cannot be written there; nothing was changed.
        Unavailable: the target cannot be reached.
    """
    file, url = data_dir / DATABASE_FILE, parse_database_url(database)
    if not file.exists():
        raise Conflict(f"{data_dir} has no {DATABASE_FILE}: there are no rows to move")
    with hold(data_dir):
        identity = DataDirIdentity(data_dir)
        source, target = Database(sqlite_url(file)), Database(url)
        try:
            num_rows = _copy(source, target, on_table)
        finally:
            await source.close()
            await target.close()
        # In this order: after a death between two of these either start works, and so does this call.
        identity.move_to(url)
        left = file.with_name(file.name + ".moved")
        file.rename(left)
    return Moved(num_rows, shown(url), left)


def _copy(source: Database, target: Database, on_table: move.OnTable) -> int:
    claim = target.claim()
    assert claim is not None, "PostgreSQL"
    try:
        move.prepare(target)
        migrate.upgrade(source.url)
        return move.copy_rows(source, target, on_table)
    finally:
        claim.release()
