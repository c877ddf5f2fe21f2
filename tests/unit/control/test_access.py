"""Keys: only digests are kept, each belongs to a team, revocation counts at once in every process."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from selfloop.control.resources.access import Access
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest, Denied, NotFound
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
