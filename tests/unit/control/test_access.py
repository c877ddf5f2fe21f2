"""Keys: only digests are kept, each belongs to a team, revocation counts at once in every process."""

import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.resources.access import Access
from selfloop.storage.db import queries_access
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest, Denied, NotFound
from selfloop.types.roles import Role, parse_role
from stores import database_url


@pytest.fixture
async def db(tmp_path: Path) -> AsyncGenerator[Database]:
    db = Database(database_url(tmp_path))
    yield db
    await db.close()


@pytest.fixture
def access(db: Database, tmp_path: Path) -> Access:
    return Access(db, tmp_path / "keys_revoked")


async def test_a_first_key_is_made_once(access: Access) -> None:
    key = await access.ensure_first_key(None)
    assert key is not None
    assert (await access.authenticate(key)).key_name == "first"
    assert await access.ensure_first_key(None) is None


async def test_a_given_key_is_taken_instead(access: Access) -> None:
    assert await access.ensure_first_key("mine") is None
    assert await access.ensure_first_key("mine") is None
    assert (await access.authenticate("mine")).key_name == "environment"
    assert len(await access.keys()) == 1


@pytest.mark.parametrize("key", [None, "", "wrong"])
async def test_without_a_valid_key_nobody_gets_in(access: Access, key: str | None) -> None:
    await access.ensure_first_key("mine")
    with pytest.raises(Denied):
        await access.authenticate(key)


async def test_revocation_in_another_process_counts_at_once(access: Access, db: Database, tmp_path: Path) -> None:
    key = await access.ensure_first_key(None)
    caller = await access.authenticate(key)
    elsewhere = Access(db, tmp_path / "keys_revoked")
    await elsewhere.revoke_key(caller.key_id)
    with pytest.raises(Denied):
        await access.authenticate(key)
    with pytest.raises(NotFound):
        await elsewhere.revoke_key(caller.key_id)


async def test_a_revoked_key_cannot_be_given_again(access: Access) -> None:
    await access.ensure_first_key("mine")
    await access.revoke_key((await access.authenticate("mine")).key_id)
    with pytest.raises(BadRequest, match="SELFLOOP_API_KEY"):
        await access.ensure_first_key("mine")


async def test_keys_belong_to_teams(access: Access) -> None:
    await access.ensure_first_key("mine")
    other = await access.authenticate(await access.create_key("ci", "research"))
    mine = await access.authenticate("mine")
    assert other.team_id != mine.team_id
    assert [team.name for team in await access.teams_of(other)] == ["research"]
    same = await access.authenticate(await access.create_key("laptop", "research"))
    assert same.team_id == other.team_id


async def test_the_key_itself_is_nowhere_on_disk(access: Access, tmp_path: Path) -> None:
    key = await access.ensure_first_key(None)
    assert key is not None
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes(), file


async def test_two_revocations_within_one_tick_of_the_clock(access: Access, db: Database, tmp_path: Path) -> None:
    """The second is noticed, too, although the file's time may be that of the first."""
    elsewhere = Access(db, tmp_path / "keys_revoked")
    callers = {key: await access.authenticate(key) for key in [await access.create_key("x", "t") for _ in range(3)]}
    for key, caller in callers.items():
        await elsewhere.revoke_key(caller.key_id)
        os.utime(tmp_path / "keys_revoked", ns=(1, 1))
        with pytest.raises(Denied):
            await access.authenticate(key)


async def test_a_key_that_is_revoked_while_it_is_looked_up_is_not_remembered(
    access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await access.create_key("x", "t")
    (row,) = await access.keys()
    look_up = queries_access.key_by_hash

    async def slow(session: AsyncSession, sha256: str) -> object:
        found = await look_up(session, sha256)
        await access.revoke_key(row.id)
        with pytest.raises(Denied):
            await access.authenticate("another")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(queries_access, "key_by_hash", _once(slow, look_up))
        await access.authenticate(key)
    with pytest.raises(Denied):
        await access.authenticate(key)


def _once(first: Any, then: Any) -> Any:
    calls = iter([first])
    return lambda *arguments: next(calls, then)(*arguments)


async def test_valid_keys_are_read_anew_from_time_to_time(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should whoever revoked one have died before the others know."""
    key = await access.create_key("x", "t")
    caller = await access.authenticate(key)
    now = time.monotonic()
    await access.revoke_key(caller.key_id)
    (access._marker).unlink()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    with pytest.raises(Denied):
        await access.authenticate(key)


async def test_an_expired_key_is_refused_although_it_was_used(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await access.create_key("x", "t", expires_in_s=60)
    caller = await access.authenticate(key)
    assert caller.expires_at is not None
    assert [row.id for row in await access.valid_keys(caller)] == [caller.key_id]
    monkeypatch.setattr(time, "time", lambda: caller.expires_at)
    with pytest.raises(Denied, match="expired"):
        await access.authenticate(key)
    assert await access.valid_keys(caller) == []


@pytest.mark.parametrize("seconds", [0, -1, 1e12, float("nan")])
async def test_a_life_that_is_none_is_refused(access: Access, seconds: float) -> None:
    with pytest.raises(BadRequest, match="expires_in_seconds"):
        await access.create_key("x", "t", expires_in_s=seconds)


async def test_roles(access: Access) -> None:
    first = await access.ensure_first_key(None)
    assert (await access.authenticate(first)).role == Role.ADMIN
    for role in Role:
        assert (await access.authenticate(await access.create_key("x", "t", role))).role == role
    assert (await access.authenticate(await access.create_key("x", "t"))).role == Role.MEMBER
    with pytest.raises(BadRequest, match="admin, member, read-only"):
        parse_role("root")


async def test_keys_are_made_and_found_in_the_callers_team_only(access: Access) -> None:
    boss = await access.authenticate(await access.create_key("boss", "a", Role.ADMIN))
    other = await access.authenticate(await access.create_key("x", "b"))
    made = await access.authenticate(await access.create_key_by(boss, "helper", Role.MEMBER, None))
    assert made.team_id == boss.team_id
    shown = (await access.key_shown_as(boss, made.key_id)).prefix
    assert (await access.key_shown_as(boss, shown)).id == made.key_id
    with pytest.raises(NotFound):
        await access.key_shown_as(boss, other.key_id)
