"""Streams of samples survive the death of their worker, and end with whoever reads them."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fake_house import FakeHouse
from fake_worker import sampled
from selfloop.control.resources.catalogue import EMBEDDED_MODEL
from selfloop.control.sampling.chats import Chat
from selfloop.control.sampling.service import SampleSpec, Sampling, Weights
from selfloop.storage.db.tables import SamplerRow
from selfloop.types.errors import BadRequest, Conflict, WorkerLost
from selfloop.types.sampling import SampleDelta, SampleRequest, SampleResult, SamplingParams

BASE = Weights(None, 0)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[FakeHouse]:
    house = await FakeHouse.open(tmp_path)
    await house.context.catalogue.seed()
    yield house
    await house.crash()


@pytest.fixture
def sampling(house: FakeHouse) -> Sampling:
    return Sampling(house.context)


def sampler(status: str = "ACTIVE") -> SamplerRow:
    return SamplerRow(
        id="sampler",
        session_id="session",
        team_id="team",
        key_id="key",
        base_model=EMBEDDED_MODEL,
        model_name=EMBEDDED_MODEL,
        model_id="model",
        deployment_id="deployment",
        max_seq_len=64,
        scale_down_delay_s=3600,
        created_at=0.0,
        status=status,
    )


def spec(seed: int | None = 3, n: int = 2) -> SampleSpec:
    return SampleSpec([1, 2], n, SamplingParams(max_tokens=5, seed=seed))


async def texts(sampling: Sampling, asked: SampleSpec) -> tuple[list[str], SampleResult]:
    """The streamed text of each sample, and the result that the stream ends with."""
    grown = [""] * asked.num_samples
    result: SampleResult | None = None
    async for event in sampling.stream(sampler(), BASE, asked):
        assert result is None, "the result comes last"
        if isinstance(event, SampleDelta):
            assert len(event.tokens) == len(event.logprobs)
            grown[event.index] += event.text
        else:
            result = event
    assert result is not None
    assert [s.text for s in result.sequences] == grown
    return grown, result


def expected(asked: SampleSpec) -> list[str]:
    return [s.text for s in sampled(SampleRequest("", asked.prompt, asked.num_samples, asked.params))]


async def test_a_stream_is_the_sample(sampling: Sampling):
    grown, _ = await texts(sampling, spec())
    assert grown == expected(spec()) == [s.text for s in (await sampling.sample(sampler(), BASE, spec())).sequences]


@pytest.mark.parametrize("deaths", [[0], [3], [9], [10], [3, 7], [7, 3]])
async def test_a_lost_worker_is_not_noticed(house: FakeHouse, sampling: Sampling, deaths: list[int]):
    house.lifecycle.sample_deaths = deaths[:]
    assert (await texts(sampling, spec()))[0] == expected(spec())
    assert len(house.lifecycle.workers) == len(deaths) + 1


async def test_without_a_seed_one_is_chosen_for_all_attempts(house: FakeHouse, sampling: Sampling):
    house.lifecycle.sample_deaths = [4]
    await texts(sampling, spec(seed=None))
    assert len(house.lifecycle.workers) == 2


async def test_sampling_that_does_not_repeat_is_an_error(house: FakeHouse, sampling: Sampling):
    house.lifecycle.sample_deaths, house.lifecycle.salts = [4], [0, 1]
    events = sampling.stream(sampler(), BASE, spec())
    given = [await anext(events) for _ in range(4)]
    with pytest.raises(WorkerLost, match="gave another text"):
        await anext(events)
    assert all(isinstance(event, SampleDelta) for event in given)
    await house.lifecycle.workers[1].call_is_done()
    assert house.lifecycle.workers[1].cancelled, "nobody reads what is sampled again"


async def test_it_gives_up(house: FakeHouse, sampling: Sampling):
    house.lifecycle.sample_deaths = [1, 1, 1]
    with pytest.raises(WorkerLost, match="3 times"):
        await texts(sampling, spec())


@pytest.mark.parametrize("num_read", [1, 4])
async def test_a_reader_that_goes_away_ends_the_sampling(house: FakeHouse, sampling: Sampling, num_read: int):
    async with contextlib.aclosing(sampling.stream(sampler(), BASE, spec())) as events:
        for _ in range(num_read):
            await anext(events)
    (worker,) = house.lifecycle.workers
    await worker.call_is_done()
    assert len(worker.cancelled) == 1


async def test_a_stream_read_to_its_end_cancels_nothing(house: FakeHouse, sampling: Sampling):
    await texts(sampling, spec())
    await sampling.sample(sampler(), BASE, spec())
    assert house.lifecycle.workers[0].cancelled == []


async def test_questions_about_text(sampling: Sampling):
    assert await sampling.tokenize(sampler(), ["ab", "c"]) == [[0, 97, 98], [0, 99]]
    assert await sampling.tokenize(sampler(), ["ab"], add_special_tokens=False) == [[97, 98]]
    assert await sampling.render_chat(sampler(), Chat(b"[]")) == (list(b"[]"), [])
    with pytest.raises(BadRequest) as caught:
        await sampling.tokenize(sampler(), [""])
    assert (caught.value.field, caught.value.expected) == ("prompt", "at least one character")


async def test_what_cannot_be_sampled_is_refused_first(house: FakeHouse, sampling: Sampling):
    asked = SampleSpec([1] * 60, 1, SamplingParams(max_tokens=5))
    for wrong in (asked, SampleSpec([10**6], 1, SamplingParams(max_tokens=5))):
        with pytest.raises(BadRequest):
            await anext(sampling.stream(sampler(), BASE, wrong))
    with pytest.raises(Conflict):
        await anext(sampling.stream(sampler("INACTIVE"), BASE, spec()))
    with pytest.raises(Conflict):
        await sampling.tokenize(sampler("INACTIVE"), ["a"])
    assert house.lifecycle.workers == []
