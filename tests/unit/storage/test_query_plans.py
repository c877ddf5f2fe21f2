"""What is asked all the time is found by an index, on both databases, however long the history is."""

import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import stores
from bench.harness.aged_rows import Owner, Sizes, fill, id_of
from selfloop.storage.db import keyset, migrate, queries_checkpoints, queries_operations, queries_resources
from selfloop.storage.db import queries_samples as samples
from selfloop.storage.db.address import is_sqlite, sqlite_url
from selfloop.storage.db.backend import IMMEDIATE, backend_of
from selfloop.storage.db.database import Database
from selfloop.storage.db.queries_listings import Owner as ListOwner
from selfloop.storage.db.queries_listings import Page, last_checkpoints, last_requests
from selfloop.storage.db.queries_listings import sessions as sessions_page
from selfloop.storage.db.tables import KeyRow, TeamRow

SIZES = Sizes(
    runs=400, checkpoints=2000, operations=2000, samples=200, usage=400, minutes=40, log_lines=0, deployed=10, live=5
)
MODEL = "tiny/llama"
CUT = keyset.Cut(20, keyset.Place(time.time() - 86_400 * 30, "x"))
_MAY_BE_SCANNED = r"INDEX ix_sessions_open|SCAN (CONSTANT|\(subquery|ranked|anon)"
Ask = Callable[[AsyncSession], Awaitable[object]]

LISTS: dict[str, Ask] = {
    "runs of a team": lambda s: queries_resources.runs_part(s, CUT, team_id="team"),
    "runs of a key": lambda s: queries_resources.runs_part(s, CUT, team_id="team", key_id="key"),
    "samplers of a team": lambda s: queries_resources.samplers_part(s, CUT, team_id="team"),
    "samplers of a key": lambda s: queries_resources.samplers_part(s, CUT, team_id="team", key_id="key"),
    "deployments of a team": lambda s: queries_resources.deployments_part(s, CUT, team_id="team"),
    "deployments of a key": lambda s: queries_resources.deployments_part(s, CUT, team_id="team", key_id="key"),
    "checkpoints of a model": lambda s: queries_checkpoints.matching_part(s, CUT, "team", base_model=MODEL),
    "checkpoints of a key": lambda s: queries_checkpoints.matching_part(s, CUT, "team", base_model=MODEL, key_id="key"),
    "checkpoints of a run": lambda s: queries_checkpoints.matching_part(s, CUT, "team", run_id=id_of("r", 3)),
}
FOUND: dict[str, Ask] = {
    "live deployments": queries_resources.live_deployments,
    "live samplers": queries_resources.live_samplers,
    "open sessions": queries_resources.open_sessions,
    "samplers of runs": lambda s: queries_resources.samplers_of_runs(s, [id_of("r", 3), id_of("r", 4)]),
    "newest samplers": lambda s: queries_resources.newest_samplers_on(s, [id_of("d", 3), id_of("d", 4)]),
    "active runs": lambda s: queries_resources.active_runs_on(s, [id_of("d", 3), id_of("d", 4)]),
    "runs of a session": lambda s: queries_resources.runs(s, session_id=id_of("s", 3)),
    "samplers of a session": lambda s: queries_resources.samplers(s, session_id=id_of("s", 3)),
    "a model's newest sampler": lambda s: queries_resources.newest_of_model(s, "team", id_of("k", 3)),
    "expired checkpoints": lambda s: queries_checkpoints.expired(s, time.time()),
    "snapshots of samplers": lambda s: queries_checkpoints.of_samplers(s, [id_of("p", 3)]),
    "queued operations": lambda s: queries_operations.in_state(s, "queued"),
    "blobs of operations": lambda s: queries_operations.blob_keys(s, id_of("r", 3)),
    "queued samples": samples.queued,
    "blobs of samples": lambda s: samples.blob_keys(s, id_of("p", 3)),
    "last checkpoints": lambda s: last_checkpoints(s, [id_of("r", 3), id_of("r", 4)], "team"),
    "last requests": lambda s: last_requests(s, [id_of("r", 3), id_of("r", 4)]),
    "sessions": lambda s: sessions_page(s, ListOwner("team", None), Page(20, 0)),
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> URL:
    if request.param == "postgresql":
        server: stores.PostgresServer = request.getfixturevalue("postgres")
        made = server.url(server.ensure("query_plans"))
    else:
        made = sqlite_url(tmp_path_factory.mktemp("plans") / "plans.db")
        migrate.upgrade(made)
    _fill(made)
    return made


def _fill(url: URL) -> None:
    engine = backend_of(url).engine(pool_size=1)
    key = {"id": "key", "team_id": "team", "name": "k", "sha256": "x", "prefix": "x", "created_at": 0.0}
    with engine.connect().execution_options(**{IMMEDIATE: True}) as connection, connection.begin():
        connection.execute(insert(TeamRow), {"id": "team", "name": "t", "is_default": True, "created_at": 0.0})
        connection.execute(insert(KeyRow), key)
    fill(url, Owner("team", "key", MODEL), SIZES)
    # A server does this by itself; a file has no statistics.
    if not is_sqlite(url):
        with engine.connect() as connection, connection.begin():
            connection.execute(text("ANALYZE"))
    engine.dispose()


def explained(session: Session, statement: str, parameters: Any) -> str:
    connection = session.connection()
    is_postgres = connection.dialect.name == "postgresql"
    how = "EXPLAIN (FORMAT JSON) " if is_postgres else "EXPLAIN QUERY PLAN "
    rows = connection.exec_driver_sql(how + statement, parameters).all()
    return json.dumps(rows[0][0]) if is_postgres else "\n".join(row[-1] for row in rows)


async def plans(url: URL, ask: Ask) -> list[str]:
    """How the database answers each query of ``ask``; PostgreSQL goes through all rows only where it has to."""
    asked: list[tuple[str, Any]] = []
    db = Database(url)

    def noted(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        asked.append((statement, parameters))

    try:
        async with db.read() as session:
            connection = (await session.connection()).sync_connection
            assert connection is not None
            event.listen(connection, "before_cursor_execute", noted)
            await ask(session)
            event.remove(connection, "before_cursor_execute", noted)
            found: list[str] = []
            if db.is_postgres:
                await session.execute(text("SET enable_seqscan = off"))
            for statement, parameters in asked:
                found.append(await session.run_sync(explained, statement, parameters))
            return found
    finally:
        await db.close()


@pytest.mark.parametrize("name", [*LISTS, *FOUND])
async def test_no_query_looks_through_a_whole_table(url: URL, name: str):
    for plan in await plans(url, (LISTS | FOUND)[name]):
        if url.drivername.startswith("sqlite"):
            # An index of the few rows that are looked for is gone through; so are a query's own parts.
            scans = [line for line in plan.splitlines() if line.startswith("SCAN ")]
            assert not [line for line in scans if not re.search(_MAY_BE_SCANNED, line)], plan
        else:
            assert '"Seq Scan"' not in plan, plan


@pytest.mark.parametrize("name", LISTS)
async def test_a_part_of_a_list_needs_no_sorting(url: URL, name: str):
    """So that each costs what it gives, not what the list is long."""
    (plan,) = await plans(url, LISTS[name])
    if url.drivername.startswith("sqlite"):
        assert "USE TEMP B-TREE" not in plan, plan
    else:
        assert '"Sort"' not in plan, plan


async def test_the_places_of_a_list_are_those_of_its_rows(url: URL, tmp_path: Path):
    """Also between rows of one moment, which the aged checkpoints have."""
    db = Database(url)
    try:
        async with db.read() as session:
            whole = [row.id for row in await queries_checkpoints.matching(session, "team", base_model=MODEL)]
            found: list[str] = []
            cut = keyset.Cut(7)
            while True:
                part = await queries_checkpoints.matching_part(session, cut, "team", base_model=MODEL)
                found += [row.id for row in part.rows]
                if part.next is None:
                    break
                cut = keyset.Cut(7, part.next)
        assert found == whole
        assert len(whole) == SIZES.checkpoints
    finally:
        await db.close()
