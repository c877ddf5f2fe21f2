"""The connection: one writer at a time, readers beside it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from selfloop.storage.db.group_commit import GroupCommit

T = TypeVar("T")

# A second process (the command line) may hold the write lock for a moment.
_BUSY_TIMEOUT_MS = 10_000


class Database:
    """Sessions on one SQLite file. Rows that leave a session stay readable."""

    def __init__(self, path: Path) -> None:
        self.url = URL.create("sqlite+aiosqlite", database=str(path))
        self._engine: AsyncEngine = create_async_engine(self.url, pool_size=8, max_overflow=8)
        event.listen(self._engine.sync_engine, "connect", _configure)
        event.listen(self._engine.sync_engine, "begin", _begin)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._write_lock = asyncio.Lock()
        self._finishing: set[asyncio.Task[None]] = set()
        beside = create_engine(self.url.set(drivername="sqlite"), pool_size=1)
        event.listen(beside, "connect", _configure)
        event.listen(beside, "begin", _begin)
        self._grouped = GroupCommit(beside, self._write_lock)

    async def write_grouped(self, work: Callable[[Connection], T]) -> T:
        """Do ``work``, a few statements, in a transaction shared with whoever writes at the same moment.

        Returns once it is on disk. What ``work`` raises undoes its own changes only. It runs in another
        thread, and may be called twice, the first time undone.
        """
        return await self._grouped.run(work)

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncSession]:
        """A session for queries only."""
        session = self._sessions()
        try:
            yield session
        finally:
            await self._finish(session.close())

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncSession]:
        """A transaction: committed (and on disk) at the end of the block, rolled back on an exception."""
        async with self._write_lock:
            session = self._sessions()
            try:
                await session.connection(execution_options={"immediate": True})
                yield session
            except BaseException:
                await self._finish(session.close())
                raise
            await self._finish(_commit(session))

    async def _finish(self, work: Coroutine[None, None, None]) -> None:
        """Give a connection back in a task of its own: a caller that is cancelled meanwhile must not break it off."""
        task = asyncio.create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Let go of the file, once the sessions of callers that were cancelled have given their connections back."""
        while self._finishing:
            await asyncio.gather(*self._finishing, return_exceptions=True)
        await self._grouped.close()
        await self._engine.dispose()


async def _commit(session: AsyncSession) -> None:
    try:
        await session.commit()
    finally:
        await session.close()


def _configure(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself: BEGIN is ours, see _begin.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    # A writer takes the lock first: upgrading a reader half-way can fail with "database is locked".
    # A reader needs no transaction: each query sees one state of the database.
    if connection.get_execution_options().get("immediate", False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
