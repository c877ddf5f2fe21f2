"""PostgreSQL as the database: what SQLite gives by itself must be proven of a server that may stop at any moment."""

import asyncio
import contextlib
import importlib.util
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, select, text
from sqlalchemy.engine import URL

from commit_cutter import CommitCutter
from selfloop.storage.db import migrate
from selfloop.storage.db.address import parse_database_url, shown
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import Base, TeamRow
from selfloop.types.errors import BadRequest, Conflict, Unavailable
from stores import PASSWORD, PostgresServer, name_of


@pytest.fixture
def url(postgres: PostgresServer, tmp_path: Path) -> URL:
    return postgres.url(postgres.ensure(name_of(tmp_path)))


@pytest.fixture
async def db(url: URL) -> AsyncGenerator[Database]:
    db = Database(url)
    yield db
    await db.close()


def _insert(id: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        statement = text("INSERT INTO teams (id, name, is_default, created_at) VALUES (:id, :id, false, 0)")
        connection.execute(statement, {"id": id})

    return work


async def _ids(db: Database) -> set[str]:
    async with db.read() as session:
        return set(await session.scalars(text("SELECT id FROM teams")))


def test_migrations_give_the_tables_that_the_code_uses(postgres: PostgresServer) -> None:
    url = postgres.url(postgres.ensure("from_nothing", "template0"))
    assert migrate.schema_of(url) == "absent"
    migrate.upgrade(url)
    migrate.upgrade(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_a_newer_database_is_refused_and_its_password_not_shown(url: URL) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(migrate.NewerDatabase, match="newer Selfloop") as caught:
        migrate.upgrade(url)
    assert PASSWORD not in str(caught.value)
    assert shown(url) in str(caught.value)


@pytest.mark.parametrize("given", [f"mysql://u:{PASSWORD}@host/db", f"postgresql://u:{PASSWORD}@host", "no address"])
def test_an_address_of_another_kind_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(BadRequest, match="postgresql://user") as caught:
        parse_database_url(given)
    assert PASSWORD not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"selfloop\[postgres\]"):
        parse_database_url("postgresql://u@host/db")


async def test_every_string_comes_back_as_it_was(db: Database) -> None:
    names = ["plain", "nul \x00 within", "\ue000", "\ue0000", "\x00\ue000\x001"]
    async with db.write() as session:
        session.add_all(
            [TeamRow(id=f"t{i}", name=name, is_default=False, created_at=0.1) for i, name in enumerate(names)]
        )
    async with db.read() as session:
        assert [row.name for row in await session.scalars(select(TeamRow).order_by(TeamRow.id))] == names


async def test_writers_of_two_processes_take_turns(db: Database, url: URL) -> None:
    """Each reads and then writes what it read: with both at once one of the counts would be lost."""
    await db.write_grouped(_insert("counter"))
    other = Database(url)

    async def count(own: Database) -> None:
        async with own.write() as session:
            row = await session.get(TeamRow, "counter")
            assert row is not None
            await asyncio.sleep(0.001)
            row.created_at += 1

    await asyncio.gather(*(count(own) for own in (db, other) for _ in range(20)))
    await other.close()
    async with db.read() as session:
        row = await session.get(TeamRow, "counter")
        assert row is not None
        assert row.created_at == 40


async def test_a_crash_of_the_server_is_waited_for(db: Database, postgres: PostgresServer) -> None:
    await db.write_grouped(_insert("before"))
    postgres.stop(signal.SIGQUIT)
    reading = asyncio.create_task(_ids(db))
    writing = asyncio.create_task(db.write_grouped(_insert("meanwhile")))
    await asyncio.sleep(0.5)
    assert not reading.done()
    assert not writing.done()
    await asyncio.to_thread(postgres.start)
    await writing
    assert "before" in await reading
    assert await _ids(db) == {"before", "meanwhile"}


async def test_connections_that_the_server_ended_are_replaced(db: Database, url: URL, postgres: PostgresServer) -> None:
    await db.write_grouped(_insert("before"))
    async with db.write() as session:
        session.add(TeamRow(id="also", name="also", is_default=False, created_at=0))
    # More at once than there are connections for: all of them are open now.
    await asyncio.gather(*(_ids(db) for _ in range(40)))
    with postgres.admin() as admin:
        ended = admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [url.database]
        ).fetchall()
    assert len(ended) > 16
    assert await asyncio.gather(*(_ids(db) for _ in range(40))) == [{"before", "also"}] * 40
    await db.write_grouped(_insert("grouped"))
    async with db.write() as session:
        session.add(TeamRow(id="alone", name="alone", is_default=False, created_at=0))
    assert await _ids(db) == {"before", "also", "grouped", "alone"}


async def test_a_server_that_stays_away_is_reported(
    db: Database, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfloop.storage.db.database._OUTAGE_WAIT_S", 0.3)
    postgres.stop()
    try:
        with pytest.raises(Unavailable, match="cannot be reached") as caught:
            await _ids(db)
        assert PASSWORD not in str(caught.value)
        assert caught.value.retry_s > 0
        with pytest.raises(Unavailable):
            await db.write_grouped(_insert("a"))
        with pytest.raises(Unavailable):
            async with db.write():
                pass
    finally:
        await asyncio.to_thread(postgres.start)
    assert await _ids(db) == set()


@pytest.fixture
def cutter(url: URL) -> Iterator[CommitCutter]:
    cutter = CommitCutter(url)
    yield cutter
    cutter.close()


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
async def test_a_commit_that_is_not_answered_counts_once(cutter: CommitCutter, arrives: bool, grouped: bool) -> None:
    """The connection breaks at a commit, before or after the server has it: what became of it is found out."""
    db = Database(cutter.url)
    # Both ways to write have their connections.
    await db.write_grouped(_insert("grouped"))
    async with db.write() as session:
        session.add(TeamRow(id="alone", name="alone", is_default=False, created_at=0))
    cutter.cut_next_commit(arrives=arrives)
    if grouped:
        await db.write_grouped(_insert("one"))
    else:
        with contextlib.nullcontext() if arrives else pytest.raises(Unavailable):
            async with db.write() as session:
                session.add(TeamRow(id="one", name="one", is_default=False, created_at=0))
    assert cutter.num_cut == 1
    assert await _ids(db) == {"grouped", "alone"} | ({"one"} if grouped or arrives else set())
    await db.close()


async def test_one_gateway_at_a_time(db: Database, url: URL) -> None:
    claim = db.claim()
    assert claim is not None
    other = Database(url)
    with pytest.raises(Conflict, match="another selfloop server") as caught:
        other.claim()
    assert PASSWORD not in str(caught.value)
    claim.release()
    second = other.claim()
    assert second is not None
    second.release()
    await other.close()


async def test_what_lost_the_database_writes_nothing(db: Database, url: URL, postgres: PostgresServer) -> None:
    claim = db.claim()
    assert claim is not None
    await db.write_grouped(_insert("held"))
    lost = threading.Event()
    keeping = asyncio.create_task(claim.keep(lambda _reason: lost.set()))
    other = Database(url)
    with postgres.admin() as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 2")
    taken = None
    deadline = time.monotonic() + 5
    while taken is None and time.monotonic() < deadline:
        try:
            taken = other.claim()
        except Conflict:
            await asyncio.sleep(0)
    assert taken is not None
    writing = asyncio.create_task(db.write_grouped(_insert("late")))
    assert await asyncio.to_thread(lost.wait, 10)
    await keeping
    assert not writing.done()
    assert await _ids(db) == {"held"}
    writing.cancel()
    claim.release()
    taken.release()
    await other.close()


async def test_a_lock_that_only_broke_is_taken_again(db: Database, postgres: PostgresServer) -> None:
    claim = db.claim()
    assert claim is not None
    keeping = asyncio.create_task(claim.keep(lambda reason: pytest.fail(reason)))
    with postgres.admin() as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 2")
    await db.write_grouped(_insert("after"))
    assert await _ids(db) == {"after"}
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    claim.release()
