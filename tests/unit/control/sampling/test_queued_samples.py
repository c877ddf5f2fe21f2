"""Samples that are accepted first and sampled later, and requests that come twice."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from fake_sampling import SAMPLER_ID, FakeSamplingHouse, spec_of
from selfloop.control.queue.operations import Pending
from selfloop.control.sampling.idempotency import Answer, SampleIdempotency
from selfloop.control.sampling.queued_samples import Failed, Sampled
from selfloop.control.sampling.service import Weights
from selfloop.storage.db.tables import QueuedSampleRow
from selfloop.types.errors import Conflict, NotFound, OperationFailed
from selfloop.types.sampling import AdapterRef
from selfloop.types.status import OperationState


async def finished(house: FakeSamplingHouse, id: str) -> Sampled | Failed:
    outcome = await house.queue.wait(SAMPLER_ID, id, 20.0)
    assert not isinstance(outcome, Pending), outcome
    return outcome


def test_sampled_again_after_a_crash_with_the_same_seed(tmp_path: Path):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        house.sampling.gate.clear()
        await house.accept(spec_of(3), "one")
        await house.accept(spec_of(4, length=20_000), "large")
        waiting = await house.queue.wait(SAMPLER_ID, "one", 0.02)
        assert waiting == Pending("running")
        await house.crash()
        house = await FakeSamplingHouse.open(tmp_path)
        first = await finished(house, "one")
        large = await finished(house, "large")
        assert isinstance(first, Sampled)
        assert isinstance(large, Sampled)
        assert first.result.sequences[0].tokens[1] == (first.request.spec.params.seed or 0) % 2**31
        assert len(large.result.sequences[0].tokens) == 20_002
        await house.crash()
        house = await FakeSamplingHouse.open(tmp_path)
        assert await finished(house, "one") == first
        assert await finished(house, "large") == large
        assert house.sampling.num_sampled == 0
        await house.crash()

    asyncio.run(play())


def test_what_an_older_version_accepted_is_sampled(tmp_path: Path):
    """What is sampled was called ``draw`` there, and lies in rows under that name."""
    stored = {
        "draw": {"prompt": [3], "num_samples": 1, "params": {"max_tokens": 4, "seed": 11}, "record_as": None},
        "checkpoint_id": None,
        "policy_version": 7,
        "with_logprobs": False,
    }

    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        async with house.house.db.write() as session:
            session.add(
                QueuedSampleRow(
                    sampler_id=SAMPLER_ID,
                    id="old",
                    fingerprint="old",
                    state=OperationState.QUEUED,
                    created_at=0.0,
                    payload=msgspec.msgpack.encode(stored),
                )
            )
        await house.crash()
        house = await FakeSamplingHouse.open(tmp_path)
        outcome = await finished(house, "old")
        assert isinstance(outcome, Sampled)
        assert outcome.result.sequences[0].tokens == [3, 11, 7]
        assert msgspec.to_builtins(outcome.request)["draw"]["prompt"] == [3]
        await house.crash()

    asyncio.run(play())


def test_a_repeat_after_a_restart_leaves_the_large_request_as_it_was(tmp_path: Path):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        await house.accept(spec_of(4, length=20_000), "large")
        first = await finished(house, "large")
        await house.crash()
        house = await FakeSamplingHouse.open(tmp_path)
        await house.accept(spec_of(4, length=20_000), "large")  # unseeded: its own seed would be another
        assert await finished(house, "large") == first
        await house.crash()

    asyncio.run(play())


def test_cancelled_while_the_sampler_is_not_up(tmp_path: Path):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        up = asyncio.Event()
        wake = house.house.lifecycle.wake

        async def slow(id: str) -> object:
            await up.wait()
            return await wake(id)

        house.house.lifecycle.wake = slow  # type: ignore[method-assign, assignment]
        await house.accept(spec_of(3), "one")
        waiting = await house.queue.wait(SAMPLER_ID, "one", 0.01)
        assert waiting == Pending("queued until the sampler is up: loading")
        await house.queue.cancel(SAMPLER_ID, "one")
        await house.queue.cancel(SAMPLER_ID, "one")
        up.set()
        assert await finished(house, "one") == Failed("cancelled by request", "Cancelled")
        assert await house.accept(spec_of(3), "one") == "one"
        assert house.sampling.num_sampled == 0
        await house.crash()

    asyncio.run(play())


def test_errors_are_outcomes(tmp_path: Path):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        await house.accept(spec_of(-1), "fails")
        assert await finished(house, "fails") == Failed("asked to fail", "Asked")
        gone = Weights(AdapterRef("gone"), 3)
        await house.accept(spec_of(1), "unpinned", weights=gone)
        outcome = await finished(house, "unpinned")
        assert isinstance(outcome, Failed)
        assert outcome.error_class == "NotFound"
        with pytest.raises(Conflict, match="already being sampled or has ended"):
            await house.queue.cancel(SAMPLER_ID, "fails")
        await house.crash()

    asyncio.run(play())


def test_an_error_that_nobody_foresaw_is_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)

        async def broken(*_: object) -> None:
            raise ZeroDivisionError("a mistake of ours")

        monkeypatch.setattr(house.sampling, "sample", broken)
        await house.accept(spec_of(3), "one")
        failed = Failed("internal error; the server's log has the cause", "InternalError")
        assert await finished(house, "one") == failed
        (record,) = [r for r in caplog.records if r.exc_info]
        assert "sample one" in record.getMessage()
        assert "a mistake of ours" in caplog.text
        await house.crash()
        house = await FakeSamplingHouse.open(tmp_path)
        assert await finished(house, "one") == failed
        await house.crash()

    asyncio.run(play())


def test_results_are_let_go_of(tmp_path: Path):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        await house.accept(spec_of(3, length=20_000), "one")
        await finished(house, "one")
        assert len(list(house.house.blobs.children(f"samples/{SAMPLER_ID}"))) == 2
        await house.queue.purge(before=2e9 * 10)
        assert list(house.house.blobs.children(f"samples/{SAMPLER_ID}")) == []
        await house.crash()
        house = await FakeSamplingHouse.open(tmp_path)
        with pytest.raises(NotFound, match="3600 s"):
            await house.queue.wait(SAMPLER_ID, "one", 1.0)
        await house.crash()

    asyncio.run(play())


def test_long_polls_are_sent_home(tmp_path: Path):
    async def play() -> None:
        house = await FakeSamplingHouse.open(tmp_path)
        house.sampling.gate.clear()
        await house.accept(spec_of(3), "one")
        poll = asyncio.create_task(house.queue.wait(SAMPLER_ID, "one", 1000.0))
        await asyncio.sleep(0.01)
        house.queue.send_home()
        assert isinstance(await asyncio.wait_for(poll, 5), Pending)
        assert isinstance(await asyncio.wait_for(house.queue.wait(SAMPLER_ID, "one", 1000.0), 5), Pending)
        await house.crash()

    asyncio.run(play())


def test_a_repeated_request_joins_and_then_gets_the_same():
    async def play() -> None:
        now = 0.0
        once = SampleIdempotency(lambda: now)
        made = 0
        gate = asyncio.Event()

        async def make() -> Answer:
            nonlocal made
            made += 1
            await gate.wait()
            return Answer(b"%d" % made, 0)

        first = [asyncio.create_task(once.answer("s", "key", "body", make)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Conflict, match="Idempotency-Key key"):
            await once.answer("s", "key", "another body", make)
        gate.set()
        assert {(await task).content for task in first} == {b"1"}
        assert (await once.answer("s", "key", "body", make)).content == b"1"
        assert (await once.answer("other sampler", "key", "another body", make)).content == b"2"
        now = 601.0
        assert (await once.answer("s", "key", "body", make)).content == b"3"

    asyncio.run(play())


def test_an_error_is_not_kept_and_nobody_left_ends_the_sampling():
    async def play() -> None:
        once = SampleIdempotency(leave_s=0.0)
        ended: list[str] = []

        async def fail() -> Answer:
            raise OperationFailed("no", "No")

        async def hang() -> Answer:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            raise AssertionError

        async def good() -> Answer:
            return Answer(b"good", 0)

        with pytest.raises(OperationFailed):
            await once.answer("s", "key", "body", fail)
        assert (await once.answer("s", "key", "body", good)).content == b"good"
        waiting = [asyncio.create_task(once.answer("s", "slow", "body", hang)) for _ in range(2)]
        for task in waiting:
            await asyncio.sleep(0.01)
            assert ended == []
            task.cancel()
        await asyncio.sleep(0.01)
        assert ended == ["cancelled"]
        assert (await once.answer("s", "slow", "body", good)).content == b"good"

    asyncio.run(play())


def test_answers_are_kept_within_bounds():
    async def play() -> None:
        once = SampleIdempotency()
        made = 0

        async def large() -> Answer:
            nonlocal made
            made += 1
            return Answer(bytes(1024 * 1024), 0)

        for i in range(80):
            await once.answer("s", str(i), "body", large)
        await once.answer("s", "79", "body", large)
        assert made == 80
        await once.answer("s", "0", "body", large)
        assert made == 81

    asyncio.run(play())
