"""Sessions of callers that are cancelled half-way, and writes that share a transaction."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.database import Database
from stores import database_url


@pytest.mark.parametrize(("method", "opens"), [("close", "read"), ("commit", "write")])
async def test_a_cancelled_caller_does_not_break_off_giving_back_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, opens: str
) -> None:
    db = Database(database_url(tmp_path))
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


async def test_a_writer_does_not_wait_for_readers(tmp_path: Path) -> None:
    db = Database(database_url(tmp_path))
    leave, entered = asyncio.Event(), asyncio.Semaphore(0)

    async def stay() -> None:
        async with db.read():
            entered.release()
            await leave.wait()

    # More than there are connections for.
    staying = [asyncio.create_task(stay()) for _ in range(40)]
    await entered.acquire()
    await asyncio.sleep(0.1)
    async with asyncio.timeout(20), db.write() as session:
        await session.execute(text("INSERT INTO teams (id, name, is_default, created_at) VALUES ('a', 'a', false, 0)"))
    leave.set()
    await asyncio.gather(*staying)
    await db.close()


async def test_work_that_fails_undoes_only_itself(tmp_path: Path) -> None:
    db = Database(database_url(tmp_path))

    def insert(id: str) -> Callable[[Connection], str]:
        def work(connection: Connection) -> str:
            statement = text("INSERT INTO teams (id, name, is_default, created_at) VALUES (:id, :id, false, 0)")
            connection.execute(statement, {"id": f"{id}-first"})
            connection.execute(statement, {"id": id})
            return id

        return work

    async with db.write():  # Meanwhile they gather into one transaction.
        writing = [asyncio.create_task(db.write_grouped(insert(id))) for id in ("a", "b", "a-first", "c")]
        await asyncio.sleep(0.01)
    ended = await asyncio.gather(*writing, return_exceptions=True)
    assert [e if isinstance(e, str) else type(e) for e in ended] == ["a", "b", IntegrityError, "c"]
    async with db.read() as session:
        ids = set(await session.scalars(text("SELECT id FROM teams")))
    assert ids == {"a", "a-first", "b", "b-first", "c", "c-first"}
    await db.close()


async def test_looking_up_sees_what_was_written_and_never_leaves_the_loop(tmp_path: Path) -> None:
    db = Database(database_url(tmp_path))
    others: list[str] = []

    async def look_up(id: str) -> str | None:
        async with db.look_up() as session:
            return await session.scalar(text("SELECT name FROM teams WHERE id = :id"), {"id": id})

    assert await look_up("a") is None
    async with db.write() as session:
        await session.execute(text("INSERT INTO teams (id, name, is_default, created_at) VALUES ('a', 'A', false, 0)"))
        assert await look_up("a") is None
    asyncio.get_running_loop().call_soon(others.append, "another's turn")
    assert await look_up("a") == "A"
    # A server of its own is waited for; meanwhile others have their turn.
    assert others == (["another's turn"] if db.is_postgres else [])
    # More of them at once than there are connections.
    assert await asyncio.gather(*(look_up("a") for _ in range(200))) == ["A"] * 200
    await db.close()
