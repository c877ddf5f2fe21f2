"""What is pruned of an old database, and what stays."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.engine import URL

import stores
from bench.harness.aged_rows import DAY_S, Owner, Sizes, fill, id_of
from selfloop.control.resources.checkpoints.prune import Prune, Pruned, read_archive
from selfloop.storage.db import migrate, tables
from selfloop.storage.db.address import sqlite_url
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest

SIZES = Sizes(
    runs=90,
    checkpoints=90,
    operations=360,
    samples=90,
    usage=90,
    minutes=200,
    log_lines=50,
    deployed=4,
    live=3,
    fresh=0.5,
)
KEPT = 10
"""Old runs that have their checkpoint still; of all others the checkpoints were deleted."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[URL]:
    if request.param == "postgresql":
        server: stores.PostgresServer = request.getfixturevalue("postgres")
        name = stores.name_of(tmp_path)
        yield server.url(server.ensure(name))
        with server.admin() as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    else:
        made = sqlite_url(tmp_path / "prune.db")
        migrate.upgrade(made)
        yield made


@pytest.fixture
async def db(url: URL, tmp_path: Path) -> Any:
    db = Database(url)
    key = {"id": "key", "team_id": "team", "name": "k", "sha256": "x", "prefix": "x", "created_at": 0.0}
    db.in_transaction(
        lambda c: c.execute(insert(tables.TeamRow), {"id": "team", "name": "t", "is_default": True, "created_at": 0.0})
    )
    db.in_transaction(lambda c: c.execute(insert(tables.KeyRow), key))
    fill(url, Owner("team", "key", "tiny/llama"), SIZES)
    db.in_transaction(_age)
    journal = tmp_path / "journal" / id_of("r", 0)
    journal.mkdir(parents=True)
    (journal / "operation-0.result").write_bytes(b"a large result")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.jsonl").write_text("{}\n")
    yield db
    await db.close()


def _age(connection: Connection) -> None:
    """Everything is old but for the newest; most checkpoints are gone."""
    runs, operations, checkpoints = tables.RunRow, tables.OperationRow, tables.CheckpointRow
    kept = [id_of("r", n) for n in range(KEPT)]
    connection.execute(delete(checkpoints).where(checkpoints.run_id.not_in(kept)))
    old = time.time() - 60 * DAY_S
    ended = select(runs.id).where(runs.status == "INACTIVE")
    connection.execute(update(operations).where(operations.run_id.in_(ended)).values(finished_at=old, created_at=old))
    connection.execute(update(tables.QueuedSampleRow).values(finished_at=old, created_at=old))
    first = operations.run_id == id_of("r", 0), operations.id == "operation-0"
    key = f"journal/{id_of('r', 0)}/operation-0.result"
    connection.execute(update(operations).where(*first).values(result=None, result_key=key))


def count(db: Database, table: type[tables.Base], *where: Any) -> int:
    return db.reading(lambda c: c.execute(select(func.count()).select_from(table).where(*where)).scalar_one())


def rows(db: Database) -> dict[str, int]:
    return {table.name: count(db, mapper.class_) for mapper in _mappers() for table in [mapper.local_table]}


def _mappers() -> list[Any]:
    return list(tables.Base.registry.mappers)


async def prune(
    db: Database, folder: Path, *, dry_run: bool = False, archive: Path | None = None, days: float = 30
) -> Pruned:
    return await Prune(db, folder).run(days * DAY_S, archive=archive, dry_run=dry_run, on_part=lambda *_: None)


def old_runs(db: Database) -> int:
    return count(db, tables.RunRow, tables.RunRow.created_at < time.time() - 30 * DAY_S)


async def test_a_dry_run_reports_what_then_goes(db: Database, tmp_path: Path):
    before = rows(db)
    reported = await prune(db, tmp_path, dry_run=True)
    assert rows(db) == before
    done = await prune(db, tmp_path)
    after = rows(db)
    assert done.kinds == reported.kinds
    gone = {name: before[name] - after[name] for name in before if before[name] != after[name]}
    assert gone == {name: kind.num for name, kind in done.kinds.items() if name != "files"}
    assert reported.kinds["files"].size_bytes == len(b"a large result")
    assert not (tmp_path / "journal" / id_of("r", 0) / "operation-0.result").exists()
    assert (await prune(db, tmp_path)).kinds == {}


async def test_what_is_needed_stays(db: Database, tmp_path: Path):
    """Live runs with all they have, runs with a kept checkpoint, what a sampler pins, what waits, the young, usage."""
    young = time.time() - DAY_S
    pinned, waiting, changed, served = (id_of("r", n) for n in (20, 21, 22, 23))

    def need(connection: Connection) -> None:
        held = {"checkpoint_id": "x", "position": 0, "target": "sampler", "name": "x", "step": 0}
        connection.execute(insert(tables.PinnedCheckpointRow), held | {"sampler_id": id_of("p", 89), "run_id": pinned})
        operation = tables.OperationRow.run_id == waiting
        connection.execute(update(tables.OperationRow).where(operation).values(state="queued", finished_at=None))
        change = {"resource": "run", "resource_id": changed, "status": "INACTIVE", "reason": "now", "at": young}
        connection.execute(insert(tables.StatusChangeRow), change)
        live = tables.SamplerRow.run_id == served
        connection.execute(update(tables.SamplerRow).where(live).values(status="ACTIVE"))

    db.in_transaction(need)
    usage = count(db, tables.UsageRow)
    await prune(db, tmp_path)
    left = set(db.reading(lambda c: c.execute(select(tables.RunRow.id)).scalars()))
    kept = {id_of("r", n) for n in range(KEPT)}
    assert kept | {pinned, waiting, changed, served} <= left
    assert old_runs(db) == KEPT + 4
    assert {id_of("r", n) for n in range(87, 90)} <= left
    for n in (*range(KEPT), 20, 21, 22, 23, *range(87, 90)):
        for table, letter in ((tables.DeploymentRow, "d"), (tables.SessionRow, "s"), (tables.SamplerRow, "p")):
            assert count(db, table, table.id == id_of(letter, n)) == 1, (letter, n)
    assert count(db, tables.CheckpointRow) == KEPT
    assert count(db, tables.OperationRow, tables.OperationRow.run_id == waiting) == 4
    live = [id_of("r", n) for n in range(87, 90)]
    assert count(db, tables.OperationRow, tables.OperationRow.run_id.in_(live)) == 12
    assert count(db, tables.UsageRow) == usage
    # Of a kept run, what nobody asks for any more.
    assert count(db, tables.OperationRow, tables.OperationRow.run_id.in_(kept)) == 0


async def test_an_archive_has_every_row_that_went(db: Database, tmp_path: Path):
    before = rows(db)
    archive = tmp_path / "old.jsonl.zst"
    done = await prune(db, tmp_path, archive=archive)
    lines = list(read_archive(archive))
    after = rows(db)
    for name in before:
        found = [line["row"] for line in lines if line.get("table") == name]
        assert len(found) == before[name] - after[name] == getattr(done.kinds.get(name), "num", 0), name
    (file,) = [line for line in lines if "file" in line]
    assert file == {"file": f"journal/{id_of('r', 0)}/operation-0.result", "data": "YSBsYXJnZSByZXN1bHQ="}
    runs = {line["row"]["id"]: line["row"] for line in lines if line.get("table") == "runs"}
    assert runs[id_of("r", 30)]["name"] == "run 30"
    with pytest.raises(BadRequest, match="--archive"):
        await prune(db, tmp_path, archive=archive)


async def test_a_day_is_the_least(db: Database, tmp_path: Path):
    with pytest.raises(BadRequest, match="--older-than: 1d or more"):
        await prune(db, tmp_path, days=0.5)


async def test_what_came_to_be_needed_meanwhile_stays(db: Database, tmp_path: Path):
    """A server works beside it: what has a checkpoint again when its turn comes is left, with what holds it."""
    saved = id_of("r", 40)

    def on_part(_name: str, part: float) -> None:
        if part == 0:
            row = {"id": "again", "run_id": saved, "team_id": "team", "name": "again", "target": "trainer"}
            more = {"base_model": "x", "step": 0, "lora_rank": 8, "lora_alpha": 1.0, "size_bytes": 1, "created_at": 0.0}
            db.in_transaction(lambda c: c.execute(insert(tables.CheckpointRow), row | more))

    await Prune(db, tmp_path).run(30 * DAY_S, archive=None, dry_run=False, on_part=on_part)
    assert count(db, tables.RunRow, tables.RunRow.id == saved) == 1
    assert count(db, tables.SessionRow, tables.SessionRow.id == id_of("s", 40)) == 1
    assert count(db, tables.DeploymentRow, tables.DeploymentRow.id == id_of("d", 40)) == 1
    assert old_runs(db) == KEPT + 1
