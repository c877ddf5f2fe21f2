"""What SQLite itself says of a database file, asked for without changing it."""

import sqlite3
from contextlib import closing
from pathlib import Path

_MAX_COMPLAINTS = 20


def complaints(file: Path) -> list[str]:
    """What is wrong with the structure of a database; nothing for a sound one. Works beside a running server."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA cell_size_check = ON")
            found = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_MAX_COMPLAINTS})")]
            orphans = connection.execute("PRAGMA foreign_key_check").fetchmany(_MAX_COMPLAINTS)
    except sqlite3.Error as error:
        return [str(error)]
    lost = [f"row {row} of {table} refers to a row of {parent} that is gone" for table, row, parent, _ in orphans]
    return [line for line in found if line != "ok"] + lost
