"""The connection: one writer at a time, readers beside it."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from selfloop.storage.db.address import shown
from selfloop.storage.db.backend import IMMEDIATE, Postgres, Transaction, backend_of
from selfloop.storage.db.claim import Claim
from selfloop.storage.db.group_commit import GroupCommit
from selfloop.types.errors import Unavailable

T = TypeVar("T")

# How long a caller is held while the database cannot be reached, before it is asked to come again.
_OUTAGE_WAIT_S = 10.0
# Connections that are kept open: to open one takes longer than most queries.
_NUM_READERS = 16
_TRY_AGAIN_S = 0.25
_RETRY_AFTER_S = 2.0


class Database:
    """Sessions on one database. Rows that leave a session stay readable."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self._backend = backend_of(url)
        self._reading = self._backend.reading_engine(pool_size=_NUM_READERS)
        # A writer has its turn already: it must not wait for readers too.
        self._writing = self._backend.async_engine(pool_size=1)
        self._beside = self._backend.engine(pool_size=2)
        self._readers = async_sessionmaker(self._reading, expire_on_commit=False)
        self._looking_up = self._backend.look_up_engine(self._reading)
        self._lookers = async_sessionmaker(self._looking_up, expire_on_commit=False)
        self._writers = async_sessionmaker(self._writing, expire_on_commit=False)
        self._write_lock = asyncio.Lock()
        self._finishing: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()
        self._grouped = GroupCommit(self.in_transaction, self._write_lock)

    @property
    def is_postgres(self) -> bool:
        return isinstance(self._backend, Postgres)

    def claim(self) -> Claim | None:
        """Make this process the one gateway on the database. Raises :class:`Conflict` and :class:`Unavailable`."""
        return Claim(self._backend, shown(self.url)) if isinstance(self._backend, Postgres) else None

    async def write_grouped(self, work: Callable[[Connection], T]) -> T:
        """Do ``work``, a few statements, in a transaction shared with whoever writes at the same moment.

        Returns once it is on disk. What ``work`` raises undoes its own changes only. It runs in another
        thread, and may be called twice, the first time undone.

        Raises:
            Unavailable: the database cannot be reached; nothing was written.
        """
        return await self._grouped.run(work)

    def look_up(self) -> AbstractAsyncContextManager[AsyncSession]:
        """As :meth:`read`, for few rows by their keys: a query that must look through many would stop the gateway."""
        return self._session(self._lookers(), is_inline=self._looking_up is not self._reading)

    def read(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A session for queries only. Raises :class:`Unavailable`."""
        return self._session(self._readers(), is_inline=False)

    @asynccontextmanager
    async def _session(self, session: AsyncSession, *, is_inline: bool) -> AsyncGenerator[AsyncSession]:
        try:
            await self._connect(session, {})
            yield session
        except DBAPIError as error:
            self._raise_transient_error(error)
            raise
        finally:
            if is_inline:
                # Nothing of it is left to another thread, so that nothing can break it off.
                await session.close()
            else:
                await self._finish(session.close())

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncSession]:
        """A transaction: committed (and on disk) at the end of the block, rolled back on an exception.

        Raises:
            Unavailable: the database cannot be reached, or broke off; nothing was written.
        """
        async with self._write_lock:
            session = self._writers()
            try:
                await self._connect(session, {IMMEDIATE: True})
                yield session
            except DBAPIError as error:
                await self._finish(session.close())
                self._raise_transient_error(error)
                raise
            except BaseException:
                await self._finish(session.close())
                raise
            await self._finish(self._commit(session))

    async def _connect(self, session: AsyncSession, options: dict[str, Any]) -> None:
        """Get the session its connection; while the database cannot be reached, wait a little for it."""
        since = time.monotonic()
        while True:
            try:
                await session.connection(execution_options=options)
                return
            except (DBAPIError, Unavailable) as error:
                if not self._may_pass(error) or self._is_over(since):
                    raise
                await session.close()
            await asyncio.sleep(_TRY_AGAIN_S)

    def _is_over(self, since: float) -> bool:
        return self._closing.is_set() or time.monotonic() - since >= _OUTAGE_WAIT_S

    def _may_pass(self, error: DBAPIError | Unavailable) -> bool:
        return isinstance(error, Unavailable) or self._backend.is_transient_error(error)

    def _raise_transient_error(self, error: DBAPIError) -> None:
        if self._backend.is_transient_error(error):
            raise Unavailable(f"the database cannot be reached: {error.orig}", _RETRY_AFTER_S) from error

    async def _commit(self, session: AsyncSession) -> None:
        try:
            connection = (await session.connection()).sync_connection
            assert connection is not None
            transaction = self._backend.transaction(connection)
            try:
                await session.commit()
            except DBAPIError as error:
                if not await asyncio.to_thread(self._was_committed, error, transaction):
                    self._raise_transient_error(error)
                    raise
        finally:
            await session.close()

    def _was_committed(self, error: DBAPIError, transaction: Transaction | None) -> bool:
        """Whether a commit that ended in ``error`` took effect all the same."""
        if transaction is None or not self._backend.is_transient_error(error):
            return False
        return self._backend.was_committed(transaction, self._beside, self._closing)

    def in_transaction(self, work: Callable[[Connection], T]) -> T:
        """Do ``work`` in a transaction of the calling thread, which should not be the event loop's.

        Raises:
            Unavailable: the database cannot be reached; nothing was written.
        """
        since = time.monotonic()
        while True:
            try:
                with self._beside.connect().execution_options(**{IMMEDIATE: True}) as connection:
                    return self._committed(connection, work)
            except (DBAPIError, Unavailable) as error:
                if not self._may_pass(error):
                    raise
                if self._is_over(since):
                    if isinstance(error, DBAPIError):
                        self._raise_transient_error(error)
                    raise
            self._closing.wait(_TRY_AGAIN_S)

    def reading(self, work: Callable[[Connection], T]) -> T:
        """Do ``work``, which only reads, in the calling thread, which should not be the event loop's.

        Raises:
            Unavailable: the database cannot be reached.
        """
        try:
            with self._beside.connect() as connection:
                return work(connection)
        except DBAPIError as error:
            self._raise_transient_error(error)
            raise

    def _committed(self, connection: Connection, work: Callable[[Connection], T]) -> T:
        with connection.begin() as begun:
            transaction = self._backend.transaction(connection)
            value = work(connection)
            try:
                begun.commit()
            except DBAPIError as error:
                if not self._was_committed(error, transaction):
                    raise
            return value

    async def _finish(self, work: Coroutine[None, None, None]) -> None:
        """Give a connection back in a task of its own: a caller that is cancelled meanwhile must not break it off."""
        task = asyncio.create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Let go of the file, once the sessions of callers that were cancelled have given their connections back."""
        self._closing.set()
        while self._finishing:
            await asyncio.gather(*self._finishing, return_exceptions=True)
        await self._grouped.close()
        self._beside.dispose()
        await self._looking_up.dispose()
        await self._reading.dispose()
        await self._writing.dispose()
