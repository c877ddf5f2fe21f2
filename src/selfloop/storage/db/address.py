"""Where the rows lie: an SQLite file of the data directory, or a database of a PostgreSQL server."""

import importlib.util
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from selfloop.types.errors import BadRequest

_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")


def sqlite_url(file: Path) -> URL:
    return URL.create("sqlite", database=str(file))


def parse_database_url(text: str, field: str = "--database-url") -> URL:
    """The address as SQLAlchemy has it, with the driver that we use.

    Raises:
        BadRequest: no PostgreSQL address, or its driver is not installed. The text itself, which may hold a
            password, is not repeated.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        url = None
    if url is None or url.drivername not in _POSTGRES or not url.database:
        raise BadRequest(field, "postgresql://user[:password]@host[:port]/database")
    if importlib.util.find_spec("psycopg") is None:
        raise BadRequest(field, "PostgreSQL needs a driver that is not installed: pip install 'selfloop[postgres]'")
    return url.set(drivername="postgresql+psycopg")


def is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def shown(url: URL) -> str:
    """The address for people, without password and options."""
    if is_sqlite(url):
        return str(url.database)
    return URL.create("postgresql", url.username, None, url.host, url.port, url.database).render_as_string()
