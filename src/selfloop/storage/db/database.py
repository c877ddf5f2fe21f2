"""The connection: one writer at a time, readers beside it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

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

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncSession]:
        """A session for queries only."""
        async with self._sessions() as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncSession]:
        """A transaction: committed (and on disk) at the end of the block, rolled back on an exception."""
        async with self._write_lock, self._sessions() as session:
            await session.connection(execution_options={"immediate": True})
            yield session
            await session.commit()

    async def close(self) -> None:
        await self._engine.dispose()


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
