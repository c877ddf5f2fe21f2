"""Sessions are found by what their JSON says, whatever characters it has, on either database."""

from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql

from selfloop.storage.db import migrate
from selfloop.storage.db.address import sqlite_url
from selfloop.storage.db.column_types import JsonText
from selfloop.storage.db.database import Database
from selfloop.storage.db.queries_listings import Owner, Page, SessionSearch, runs, search_sessions
from selfloop.storage.db.tables import KeyRow, SessionRow, TeamRow
from stores import PostgresServer, name_of

HOSTILE = [
    "plain",
    "nul \x00 within",
    "\x00",
    "\\u0000",
    "\\\x00\\\\u0000",
    "\ue000",
    "\ue0000",
    'a"b',
    "a\\",
    "$",
    "$x",
    "$.a",
    "[0]",
    "0",
    "",
    ".",
    "é😀",
    "';--",
]


@pytest.fixture(params=["sqlite", "postgres"])
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Database]:
    if request.param == "sqlite":
        url = sqlite_url(tmp_path / "test.db")
        migrate.upgrade(url)
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.url(server.ensure(name_of(tmp_path)))
    db = Database(url)
    async with db.write() as session:
        session.add(TeamRow(id="team", name="team", is_default=True, created_at=0))
        await session.flush()
        session.add(KeyRow(id="key", team_id="team", name="k", sha256="0", prefix="0", created_at=0))
        await session.flush()
        for i, name in enumerate(HOSTILE):
            details = {"display_name": name, "project_id": name, "user_metadata": {name: f"of {name}", "n": name}}
            text = msgspec.json.encode(details).decode()
            session.add(SessionRow(id=f"s{i}", team_id="team", key_id="key", created_at=i, details=text))
        session.add(SessionRow(id="silent", team_id="team", key_id="key", created_at=99))
    yield db
    await db.close()


async def test_every_name_is_found_and_shown_as_it_was_given(db: Database) -> None:
    async def found(**search: object) -> list[SessionRow]:
        async with db.read() as session:
            return list(await search_sessions(session, SessionSearch("team", 100, **search)))

    for i, name in enumerate(HOSTILE):
        for search in (
            {"display_name": name},
            {"project_ids": [name, "absent"]},
            {"user_metadata": {name: f"of {name}"}},
            {"user_metadata": {"n": name, name: f"of {name}"}},
        ):
            rows = await found(**search)
            assert [row.id for row in rows] == [f"s{i}"], (name, search)
        assert msgspec.json.decode(rows[0].details or "")["display_name"] == name
    assert len(await found()) == len(HOSTILE) + 1
    assert [row.id for row in await found(project_ids=["default"])] == ["silent"]
    async with db.read() as session:
        assert await runs(session, Owner("team", None), Page(10, 0), with_published=False, project_id="\x00") == ([], 0)


@given(st.dictionaries(st.text(), st.text()))
def test_any_document_comes_back_and_holds_no_nul(document: dict[str, str]) -> None:
    column, dialect = JsonText(), postgresql.dialect()
    text = msgspec.json.encode(document).decode()
    stored = column.process_bind_param(text, dialect)
    assert stored is not None
    looked_into = msgspec.json.decode(stored, type=dict[str, str])
    assert len(looked_into) == len(document)
    assert "\x00" not in "".join(stored + key + value for key, value in looked_into.items())
    assert column.process_result_value(stored, dialect) == text
