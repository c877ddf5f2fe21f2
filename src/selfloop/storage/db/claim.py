"""A PostgreSQL database belongs to one gateway at a time. (An SQLite file is covered by its data directory's lock.)"""

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from selfloop.storage.db.backend import GATEWAY_LOCK, Postgres, reached
from selfloop.types.errors import Conflict

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_HOLDER = (
    "SELECT coalesce(host(client_addr), 'this machine') || ', since ' || to_char(backend_start, 'YYYY-MM-DD HH24:MI') "
    "FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted "
    f"AND classid = {GATEWAY_LOCK[0]} AND objid = {GATEWAY_LOCK[1]} "
    "AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class Claim:
    """Holds the database by a lock of a connection of its own, which ends with that connection.

    While the connection is lost nothing is written (``Postgres.write_while_held_by``); it is taken again, unless
    another gateway was faster: then ``on_lost`` is called, once.
    """

    def __init__(self, backend: Postgres, address: str) -> None:
        """Raises :class:`Conflict` when another gateway has it, :class:`Unavailable` when it cannot be reached."""
        self._backend = backend
        self._address = address
        self._engine: Engine = backend.engine(pool_size=1)
        self._connection: Connection | None = None
        try:
            with reached(backend.url):
                self._take()
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        query = f"SELECT pg_try_advisory_lock({GATEWAY_LOCK[0]}, {GATEWAY_LOCK[1]}), pg_backend_pid()"
        is_ours, pid = connection.exec_driver_sql(query).one()
        if not is_ours:
            holder = connection.exec_driver_sql(_HOLDER).scalar() or "unknown"
            connection.close()
            raise Conflict(
                f"another selfloop server (connected from {holder}) is using {self._address}; stop it or choose "
                "another --database-url"
            )
        self._connection = connection
        self._backend.write_while_held_by(int(pid))

    async def keep(self, on_lost: Callable[[str], None]) -> None:
        """Watch over the lock, for as long as the gateway lives."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await asyncio.to_thread(self._look)
            except Conflict as error:
                on_lost(str(error))
                return
            except DBAPIError as error:
                log.warning("%s cannot be reached: %s", self._address, error.orig)

    def _look(self) -> None:
        if self._connection is not None:
            try:
                self._connection.exec_driver_sql("SELECT 1")
                return
            except DBAPIError:
                self._connection.invalidate()
                self._connection.close()
                self._connection = None
        self._take()
        log.info("%s is held again", self._address)

    def release(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._engine.dispose()
