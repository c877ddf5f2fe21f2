"""Sessions of callers that are cancelled half-way."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db import migrate
from selfloop.storage.db.database import Database


@pytest.mark.parametrize(("method", "opens"), [("close", "read"), ("commit", "write")])
async def test_a_cancelled_caller_does_not_break_off_giving_back_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, opens: str
) -> None:
    migrate.upgrade(tmp_path / "test.db")
    db = Database(tmp_path / "test.db")
    begun, finished = asyncio.Event(), asyncio.Event()
    original = getattr(AsyncSession, method)

    async def slowly(session: AsyncSession) -> None:
        begun.set()
        await asyncio.sleep(0.3)
        await original(session)
        finished.set()

    monkeypatch.setattr(AsyncSession, method, slowly)

    async def use() -> None:
        async with getattr(db, opens)() as session:
            await session.execute(text("SELECT 1"))

    using = asyncio.create_task(use())
    await begun.wait()
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    await db.close()
    assert finished.is_set()
