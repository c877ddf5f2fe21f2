"""What differs between databases: how a connection is set up, how a transaction begins, what an outage looks like."""

import logging
import select
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from selfloop.storage.db.address import is_sqlite, shown
from selfloop.storage.db.inline import DRIVER
from selfloop.storage.db.portable import SQLITE_JSON_TEXT, member
from selfloop.types.errors import Unavailable

log = logging.getLogger(__name__)

IMMEDIATE = "immediate"
"""Execution option of a connection whose transaction writes."""

# A second process (the command line) may hold the write lock for a moment.
_BUSY_TIMEOUT_S = 10
# Sessions that look up something and then wait for something else, at the same time.
_NUM_LOOK_UPS = 16

# Two numbers that name our locks in a PostgreSQL database: its writer's turn, and the gateway that owns it.
_LOCKS = 0x5E1F
WRITER_LOCK = (_LOCKS, 1)
GATEWAY_LOCK = (_LOCKS, 2)

_HELD = (
    f"SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = {GATEWAY_LOCK[0]} "
    f"AND objid = {GATEWAY_LOCK[1]} AND pid = {{}})"
)

_ASK_AGAIN_S = 0.25
_UNNOTICED_S = 2.0
_RETRY_AFTER_S = 2.0
_TRANSACTION = "selfloop_transaction"


class Transaction(NamedTuple):
    """Its number, and the server's process that carries it out."""

    id: str
    server_pid: int


class Backend(Protocol):
    """Of one database: engines on it, and what their errors mean."""

    def engine(self, pool_size: int) -> Engine: ...

    def async_engine(self, pool_size: int) -> AsyncEngine: ...

    def reading_engine(self, pool_size: int) -> AsyncEngine:
        """One for queries only: each sees one state of the database, so it has no transactions."""
        ...

    def look_up_engine(self, beside: AsyncEngine) -> AsyncEngine:
        """For single rows by their keys; may be ``beside``, the engine of all else."""
        ...

    def is_transient_error(self, error: DBAPIError) -> bool:
        """Whether the server could not be reached or broke off, so that the same work may succeed later."""
        ...

    def transaction(self, connection: Connection) -> Transaction | None:
        """By which the server can say what became of the transaction that writes now; None where none can be lost."""
        ...

    def was_committed(self, transaction: Transaction, engine: Engine, closing: threading.Event) -> bool:
        """What became of a commit that was not answered. Blocks until the server says."""
        ...


@contextmanager
def reached(url: URL) -> Generator[None]:
    """For what is done before anything is served. Raises :class:`Unavailable` for an outage within the block."""
    try:
        yield
    except DBAPIError as error:
        if not backend_of(url).is_transient_error(error):
            raise
        raise Unavailable(f"{shown(url)} cannot be reached: {str(error.orig).strip()}", _RETRY_AFTER_S) from error


def backend_of(url: URL) -> Backend:
    return Sqlite(url) if is_sqlite(url) else Postgres(url)


class Sqlite:
    def __init__(self, url: URL) -> None:
        self._url = url

    def engine(self, pool_size: int) -> Engine:
        engine = create_engine(self._url, pool_size=pool_size, hide_parameters=True)
        self._listen(engine)
        return engine

    def async_engine(self, pool_size: int) -> AsyncEngine:
        url = self._url.set(drivername="sqlite+aiosqlite")
        engine = create_async_engine(url, pool_size=pool_size, max_overflow=0, hide_parameters=True)
        self._listen(engine.sync_engine)
        return engine

    def reading_engine(self, pool_size: int) -> AsyncEngine:
        return self.async_engine(pool_size)

    def look_up_engine(self, beside: AsyncEngine) -> AsyncEngine:
        engine = create_async_engine(self._url.set(drivername=DRIVER), pool_size=_NUM_LOOK_UPS, hide_parameters=True)
        self._listen(engine.sync_engine)
        # Readers wait for nobody but in the moment when a file that a crash left is put in order.
        event.listen(engine.sync_engine, "connect", self._do_not_wait)
        return engine

    def is_transient_error(self, error: DBAPIError) -> bool:
        return False

    def transaction(self, connection: Connection) -> Transaction | None:
        return None

    def was_committed(self, transaction: Transaction, engine: Engine, closing: threading.Event) -> bool:
        raise AssertionError("a file answers")

    def _listen(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._configure)
        event.listen(engine, "begin", self._begin)

    @staticmethod
    def _configure(connection: Any, _record: Any) -> None:
        # The driver must not open transactions by itself: BEGIN is ours, see _begin.
        connection.isolation_level = None
        connection.create_function(SQLITE_JSON_TEXT, 2, member, deterministic=True)
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            # A page whose cells cannot be is an error, instead of rows that never were.
            "cell_size_check=ON",
            f"busy_timeout={_BUSY_TIMEOUT_S * 1000}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @staticmethod
    def _do_not_wait(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA busy_timeout=100")

    @staticmethod
    def _begin(connection: Connection) -> None:
        # A writer takes the lock first: upgrading a reader half-way can fail with "database is locked".
        # A reader needs no transaction: each query sees one state of the database.
        if connection.get_execution_options().get(IMMEDIATE, False):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


class Postgres:
    """Writers take turns by an advisory lock, as on SQLite: then nothing can fail to be serialised, nor deadlock."""

    # SQLSTATE classes and codes: connection lost, server stops or starts, too many connections, a lock not had in
    # time, and the two that ask for the transaction to be tried again.
    _OUTAGES = ("08", "57P01", "57P02", "57P03", "53300", "55P03", "40001", "40P01")

    def __init__(self, url: URL) -> None:
        self.url = url
        self._holder_pid: int | None = None

    def write_while_held_by(self, pid: int) -> None:
        """From now on nobody writes unless this process of the server holds the database for this gateway."""
        self._holder_pid = pid

    def engine(self, pool_size: int) -> Engine:
        engine = create_engine(self.url, pool_size=pool_size, hide_parameters=True, connect_args=self._connect_args)
        self._listen(engine)
        return engine

    def async_engine(self, pool_size: int) -> AsyncEngine:
        return self._async_engine(pool_size)

    def reading_engine(self, pool_size: int) -> AsyncEngine:
        return self._async_engine(pool_size, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)

    def _async_engine(self, pool_size: int, **options: Any) -> AsyncEngine:
        engine = create_async_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=0,
            hide_parameters=True,
            connect_args=self._connect_args,
            **options,
        )
        self._listen(engine.sync_engine)
        return engine

    def look_up_engine(self, beside: AsyncEngine) -> AsyncEngine:
        return beside

    @property
    def _connect_args(self) -> dict[str, object]:
        """A server that is gone without a word is noticed within half a minute; the URL's own options win."""
        chosen = {
            "application_name": "selfloop",
            "connect_timeout": 5,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,
        }
        return {name: value for name, value in chosen.items() if name not in self.url.query}

    def is_transient_error(self, error: DBAPIError) -> bool:
        if error.connection_invalidated:
            return True
        state = getattr(error.orig, "sqlstate", None)
        if state is None:
            # Psycopg's own errors of connecting have none.
            return type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout")
        return state.startswith(self._OUTAGES)

    def transaction(self, connection: Connection) -> Transaction:
        return connection.info[_TRANSACTION]

    def was_committed(self, transaction: Transaction, engine: Engine, closing: threading.Event) -> bool:
        log.warning("the database broke off while it committed; asking what became of that")
        since = time.monotonic()
        while not closing.is_set():
            try:
                with engine.connect() as connection:
                    status = connection.exec_driver_sql(f"SELECT pg_xact_status('{transaction.id}'::xid8)").scalar()
                    if status != "in progress":
                        log.warning("the transaction that was broken off is %s", status)
                        return status == "committed"
                    if time.monotonic() - since > _UNNOTICED_S:
                        # The server has not heard that nobody is there any more.
                        connection.exec_driver_sql(f"SELECT pg_terminate_backend({transaction.server_pid})")
            except DBAPIError as error:
                if not self.is_transient_error(error):
                    raise
            closing.wait(_ASK_AGAIN_S)
        return False

    def _listen(self, engine: Engine) -> None:
        event.listen(engine, "connect", self._configure)
        event.listen(engine, "begin", self._begin)

        def check(connection: Any, record: Any, _fairy: Any) -> None:
            """Let nobody have a connection that the server has ended."""
            # Then it, or the kernel, has left something to be read. Asking each time would double the round trips.
            heard = select.poll()
            try:
                heard.register(record.driver_connection.fileno(), select.POLLIN)
                if heard.poll(0):
                    engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error as error:
                raise InvalidatePoolError from error

        event.listen(engine, "checkout", check)

    @staticmethod
    def _configure(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(
            f"SET lock_timeout = '{_BUSY_TIMEOUT_S}s'; "
            # Of a client that is gone without a word, so that it does not keep the writers' turn.
            "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
        )
        # What was accepted must be on disk, whatever the server does for others.
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        cursor.close()
        connection.commit()

    def _begin(self, connection: Connection) -> None:
        if not connection.get_execution_options().get(IMMEDIATE, False):
            return
        lock = f"pg_advisory_xact_lock({WRITER_LOCK[0]}, {WRITER_LOCK[1]})"
        turn = f"SELECT {lock}, pg_current_xact_id()::text, pg_backend_pid()"
        _, id, pid = connection.exec_driver_sql(turn).one()
        connection.info[_TRANSACTION] = Transaction(id, pid)
        if self._holder_pid is not None and not connection.exec_driver_sql(_HELD.format(self._holder_pid)).scalar():
            raise Unavailable("this server does not hold the database at the moment", _RETRY_AFTER_S)
