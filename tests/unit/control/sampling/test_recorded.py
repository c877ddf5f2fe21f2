"""Recorded sequences with their routes: kept whole, replaced, expired, and gone with their sampler."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import select, update

from fake_sampling import SAMPLER_ID, FakeSamplingHouse
from selfloop.control.resources.access import Caller
from selfloop.control.sampling.recorded import LIFE_S, RecordedSequences, sequence_id
from selfloop.storage.db.tables import RecordedSampleRow, SamplerRow
from selfloop.types.errors import OperationFailed
from selfloop.types.routes import RouteShape, SampledRoutes
from selfloop.types.sampling import SampledSequence, SampleResult

SHAPE = RouteShape("uint8", 3, 2)
PROMPT = [5, 6, 7]


class Kept(FakeSamplingHouse):
    """Recordings of one sampler in a folder."""

    @property
    def recorded(self) -> RecordedSequences:
        return RecordedSequences(self.house.db, self.house.blobs)

    async def record(self, request: str, fill: int, num_tokens: int = 4) -> None:
        tokens = list(range(num_tokens))
        sequences = [SampledSequence(tokens, [-0.5] * num_tokens, "length", "")] * 2
        prompt = bytes([fill]) * len(PROMPT) * SHAPE.token_bytes
        each = [bytes([fill + 1 + i]) * (num_tokens - 1) * SHAPE.token_bytes for i in range(2)]
        result = SampleResult(request, sequences, routes=SampledRoutes(SHAPE, prompt, each))
        await self.recorded.record(self.sampler, request, PROMPT, result, 1)

    async def use(self, request: str, index: int = 0, team: str = "team"):
        id = sequence_id(SAMPLER_ID, request, index)
        return (await self.recorded.use(CALLER_OF[team], [id])).get(id, "unknown")

    def files(self) -> list[str]:
        return list(self.house.blobs.children(f"recorded/{SAMPLER_ID}"))


def caller(team: str) -> Caller:
    return Caller(team_id=team, key_id="key", key_name="k")


CALLER_OF = {team: caller(team) for team in ("team", "other")}


@pytest_asyncio.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    own = await Kept.open(tmp_path)
    assert isinstance(own, Kept)
    yield own
    await own.crash()


@pytest.mark.asyncio
@pytest.mark.parametrize("num_tokens", [4, 4000], ids=["in the row", "in a file"])
async def test_routes_are_read_back_as_they_were(kept: Kept, num_tokens: int):
    await kept.record("a", 10, num_tokens)
    found = await kept.use("a", 1)
    assert found.routes.shape == SHAPE
    assert found.routes.prompt == bytes([10]) * 18
    assert found.routes.tokens == bytes([12]) * (num_tokens - 1) * 6
    assert found.routes.model_name == "tiny"
    assert str(found.uri) == f"bt://loops:{kept.sampler.run_id}/sequences/{SAMPLER_ID}/a/1"
    assert len(kept.files()) == (num_tokens > 100)
    assert await kept.use("a", 2) is None
    assert await kept.use("b") is None
    assert await kept.use("a", team="other") == "unknown"


@pytest.mark.asyncio
async def test_sampled_anew_a_recording_takes_the_place_of_the_one_before(kept: Kept):
    for fill in (10, 20):
        await kept.record("a", fill, 4000)
    (name,) = kept.files()
    assert (await kept.use("a")).routes.prompt == bytes([20]) * 18
    # What no row names is a crash's, and goes at the next start.
    kept.house.blobs.put(f"recorded/{SAMPLER_ID}/stray.routes", b"x")
    await kept.recorded.clear_leftovers()
    assert kept.files() == [name]


@pytest.mark.asyncio
async def test_a_use_begins_the_day_anew_and_after_it_rows_and_files_go(kept: Kept):
    for request in ("used", "unused"):
        await kept.record(request, 10, 4000)
    soon = time.time() + 5
    async with kept.house.db.write() as session:
        await session.execute(update(RecordedSampleRow).values(expires_at=soon))
    assert await kept.use("used") is not None
    async with kept.house.db.write() as session:
        table = RecordedSampleRow
        await session.execute(update(table).values(expires_at=table.expires_at - 60))
    assert await kept.use("unused") is None
    await kept.recorded.purge()
    assert [name.split("-")[0] for name in kept.files()] == ["used"]
    async with kept.house.db.read() as session:
        (row,) = (await session.scalars(select(RecordedSampleRow))).all()
    assert row.expires_at > time.time() + LIFE_S - 120


@pytest.mark.asyncio
async def test_a_samplers_recordings_end_with_it(kept: Kept):
    await kept.record("a", 10, 4000)
    async with kept.house.db.write() as session:
        await session.execute(update(SamplerRow).values(status="INACTIVE"))
    assert await kept.use("a") is None
    await kept.recorded.purge()
    assert kept.files() == []


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["damaged", "gone"])
async def test_routes_that_are_not_what_was_recorded_are_never_used(kept: Kept, how: str):
    await kept.record("a", 10, 4000)
    (name,) = kept.files()
    path = kept.house.blobs.path(f"recorded/{SAMPLER_ID}/{name}")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x63")
    with pytest.raises(OperationFailed, match=f"the routes of sequence {SAMPLER_ID}/a/0 cannot be read"):
        await kept.use("a")
