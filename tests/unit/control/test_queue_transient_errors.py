"""The queue when its own database fails for a moment, and what it remembers after the gateway's death."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import func, select

from fake_house import RUN_ID, FakeHouse
from selfloop.control.queue.journal import Failure, Submission
from selfloop.control.queue.outcomes import Outcome
from selfloop.storage.db.tables import SkippedRow
from selfloop.types.errors import OperationFailed, Unavailable
from selfloop.types.operation import AdamParams, ForwardBackward, LoadState, OptimStep, SaveState, kind_of
from selfloop.types.settings import QueueSettings

STEP = OptimStep(AdamParams())
FAILS = ForwardBackward([], "fails", {"value": 1.0})


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[FakeHouse]:
    house = await FakeHouse.open(tmp_path, QueueSettings(gap_grace_s=0.2))
    yield house
    await house.crash()


async def ended(house: FakeHouse, id: str) -> Outcome:
    outcome = await house.operations.wait(RUN_ID, id, 10.0)
    assert isinstance(outcome, Outcome), outcome
    return outcome


async def step_of(house: FakeHouse, id: str) -> float:
    outcome = await ended(house, id)
    assert outcome.result is not None, outcome.error
    return msgspec.msgpack.decode(outcome.result)["metrics"]["step"]


# -- outages --------------------------------------------------------------------------------------------------


@pytest.fixture
def transient_error(house: FakeHouse, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The next outcomes that are errors cannot be stored; returns whose they are."""
    monkeypatch.setattr("selfloop.control.queue.run_actor._RETRY_S", 0.01)
    store, met = house.journal.fail, list[str]()

    async def fail(failures: Sequence[Failure]) -> list[Failure]:
        if len(met) < 2:
            met.append(failures[0].row.id)
            raise Unavailable("the database cannot be reached", 1.0)
        return await store(failures)

    monkeypatch.setattr(house.journal, "fail", fail)
    return met


async def test_an_error_is_reported_once_it_can_be_stored(house: FakeHouse, transient_error: list[str]) -> None:
    await house.submit(FAILS, 1, "op1")
    await house.submit(STEP, 2, "op2")
    assert (await ended(house, "op1")).error == "asked to fail"
    assert await step_of(house, "op2") == 1.0
    assert transient_error == ["op1", "op1"]


async def test_an_error_that_is_being_stored_when_its_run_ends_is_reported(
    house: FakeHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, begun = house.journal.fail, asyncio.Event()

    async def slowly(failures: Sequence[Failure]) -> list[Failure]:
        stored = await store(failures)
        begun.set()
        await asyncio.sleep(0.1)
        return stored

    monkeypatch.setattr(house.journal, "fail", slowly)
    await house.submit(FAILS, 1, "op1")
    asking = asyncio.create_task(ended(house, "op1"))
    await begun.wait()
    assert await house.scheduler.end(RUN_ID) == []
    assert (await asyncio.wait_for(asking, 5)).error == "asked to fail"


async def test_a_load_of_what_is_gone(house: FakeHouse, transient_error: list[str]) -> None:
    await house.submit(LoadState(f"bt://loops:{RUN_ID}/weights/never", with_optimizer=True), 1, "op1")
    await house.submit(STEP, 2, "op2")
    assert (await ended(house, "op1")).error_class == "NotFound"
    assert await step_of(house, "op2") == 1.0
    assert transient_error == ["op1", "op1"]


async def test_a_load_that_cannot_be_kept(house: FakeHouse, transient_error: list[str]) -> None:
    await house.submit(SaveState("ckpt001", "first"), 1, "op1")
    await ended(house, "op1")
    house.lifecycle.workers[-1].full_disk = True
    await house.submit(LoadState(f"bt://loops:{RUN_ID}/weights/first", with_optimizer=True), 2, "op2")
    assert "could not be stored" in ((await ended(house, "op2")).error or "")
    await house.submit(STEP, 3, "op3")
    assert await step_of(house, "op3") == 1.0
    assert transient_error == ["op2", "op2"]


async def test_a_model_that_cannot_be_loaded(house: FakeHouse, transient_error: list[str]) -> None:
    house.lifecycle.failure = OperationFailed("no such folder", "LoadFailed")
    for seq in (1, 2):
        await house.submit(STEP, seq, f"op{seq}")
    assert {(await ended(house, f"op{seq}")).error for seq in (1, 2)} == {"no such folder"}
    house.lifecycle.failure = None
    await house.submit(STEP, 3, "op3")
    assert await step_of(house, "op3") == 1.0
    assert transient_error == ["op1", "op1"]


async def test_a_gap_that_stays_open(house: FakeHouse, transient_error: list[str]) -> None:
    for seq in (2, 3):
        await house.submit(STEP, seq, f"op{seq}")
    assert {(await ended(house, f"op{seq}")).error_class for seq in (2, 3)} == {"MissingOperation"}
    await house.submit(STEP, 4, "op4")
    assert await step_of(house, "op4") == 1.0
    assert transient_error == ["op2", "op2"]


async def test_an_operation_that_kills(house: FakeHouse, transient_error: list[str]) -> None:
    await house.submit(STEP, 1, "op1")
    await ended(house, "op1")
    house.lifecycle.workers[-1].dies_at = 0
    house.lifecycle.dies_at = 1  # It replays op1, then dies of op2.
    await house.submit(STEP, 2, "op2")
    assert (await ended(house, "op2")).error_class == "WorkerLost"
    await house.submit(STEP, 3, "op3")
    assert await step_of(house, "op3") == 2.0
    assert transient_error == ["op2", "op2"]
    assert len(house.lifecycle.workers) == 3


async def test_a_cancellation_that_cannot_be_stored_takes_nothing_away(
    house: FakeHouse, transient_error: list[str]
) -> None:
    await house.submit(STEP, 2, "op2")
    for _ in range(2):
        with pytest.raises(Unavailable):
            await house.operations.cancel(RUN_ID, "op2")
    await house.submit(STEP, 1, "op1")
    assert await step_of(house, "op2") == 2.0


# -- deaths of the gateway ------------------------------------------------------------------------------------


async def restarted(house: FakeHouse, tmp_path: Path, dies_at: int | None = None) -> FakeHouse:
    """With the usual patience, a minute: nothing here may wait for it."""
    await house.crash()
    return await FakeHouse.open(tmp_path, dies_at=dies_at)


async def test_attempts_are_counted_across_a_restart(house: FakeHouse, tmp_path: Path) -> None:
    await house.submit(STEP, 1, "op1")
    await ended(house, "op1")
    house.lifecycle.workers[-1].dies_at = 0
    # The next worker takes for ever to start.
    starting, waking = asyncio.Event(), house.lifecycle.wake

    async def wake(id: str) -> object:
        if house.lifecycle.workers[-1].lost.done():
            starting.set()
            await asyncio.sleep(3600)
        return await waking(id)

    house.lifecycle.wake = wake  # type: ignore[method-assign, assignment]
    await house.submit(STEP, 2, "op2")
    await asyncio.wait_for(starting.wait(), 10)
    again = await restarted(house, tmp_path, dies_at=1)  # It replays op1, then dies of op2.
    failed = await ended(again, "op2")
    assert failed.error_class == "WorkerLost"
    assert "ended its worker 2 times: killed by the test" in (failed.error or "")
    await again.submit(STEP, 3, "op3")
    assert await step_of(again, "op3") == 2.0
    assert len(again.lifecycle.workers) == 2
    await again.crash()


@pytest.mark.parametrize("waits", [True, False])
async def test_a_refused_place_is_not_waited_for_after_a_restart(house: FakeHouse, tmp_path: Path, waits: bool) -> None:
    await house.submit(STEP, 1, "op1")
    await ended(house, "op1")
    await house.operations.skip(await house.run(), 3)
    if waits:
        await house.submit(STEP, 4, "op4")
    again = await restarted(house, tmp_path)
    await again.submit(STEP, 2, "op2")
    if not waits:
        await again.submit(STEP, 4, "op4")
    assert await step_of(again, "op4") == 3.0
    await again.journal.purge(0.0)
    async with again.db.read() as session:
        assert await session.scalar(select(func.count()).select_from(SkippedRow)) == 0
    await again.crash()


async def test_a_corrected_call_may_take_its_place_after_a_restart(house: FakeHouse, tmp_path: Path) -> None:
    await house.operations.skip(await house.run(), 1)
    again = await restarted(house, tmp_path)
    await again.submit(STEP, 1, "op1")
    assert await step_of(again, "op1") == 1.0
    await again.crash()


async def test_places_of_refused_and_cancelled_operations_are_known_after_a_restart(
    house: FakeHouse, tmp_path: Path
) -> None:
    refused = Submission("op2", kind_of(STEP), 2, "f")
    await house.operations.refuse(await house.run(), refused, "no such loss", "BadRequest")
    await house.submit(STEP, 3, "op3")
    await house.operations.cancel(RUN_ID, "op3")
    again = await restarted(house, tmp_path)
    await again.submit(STEP, 4, "op4")
    await again.submit(STEP, 1, "op1")
    assert await step_of(again, "op4") == 2.0
    assert (await ended(again, "op2")).error == "no such loss"
    await again.crash()


async def test_what_is_refused_behind_the_order_is_not_noted(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    for seq in (0, 1, 5000):
        await house.operations.skip(await house.run(), seq)
    assert await house.journal.skipped() == []
