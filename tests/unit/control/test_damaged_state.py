"""Bits that changed in snapshots, payloads, results and rows: noticed, reported, and gone around where that can be."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import text

from fake_house import RUN_ID, FakeHouse
from fake_worker import FakeState
from selfloop.control.queue.outcomes import Outcome
from selfloop.control.resources.checkpoints import retention
from selfloop.types.operation import AdamParams, ForwardBackward, LoadState, Operation, OptimStep, SaveState
from selfloop.types.result import Result, StepResult
from selfloop.types.settings import QueueSettings

STEP = OptimStep(AdamParams())


def train(value: int) -> ForwardBackward:
    """Too large for its row."""
    return ForwardBackward([], "cross_entropy", {"value": float(value), "pad" * 10_000: 1.0})


def small(value: int) -> ForwardBackward:
    return ForwardBackward([], "cross_entropy", {"value": float(value)})


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[FakeHouse]:
    house = await FakeHouse.open(tmp_path, QueueSettings(gap_grace_s=0.2, snapshot_every_s=1000.0))
    yield house
    await house.crash()


async def outcome(house: FakeHouse, id: str) -> Outcome:
    found = await house.operations.wait(RUN_ID, id, 10.0)
    assert isinstance(found, Outcome), found
    return found


async def do(house: FakeHouse, *operations: Operation) -> Result:
    """Carry them out one by one; returns the last one's result."""
    for operation in operations:
        seq = (await house.run()).next_seq
        await house.submit(operation, seq, f"op{seq}")
        found = await outcome(house, f"op{seq}")
        assert found.result is not None, found.error
    return msgspec.msgpack.decode(found.result, type=Result)


async def fails(house: FakeHouse, operation: Operation) -> str:
    """Its error, which is that of a recovery."""
    seq = (await house.run()).next_seq
    await house.submit(operation, seq, f"op{seq}")
    found = await outcome(house, f"op{seq}")
    assert found.error_class == "RecoveryFailed", found
    return found.error or ""


def weights_after(*operations: Operation) -> float:
    state = FakeState(weights=8)
    for operation in operations:
        state.apply(operation)
    return float(state.weights)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


async def kill(house: FakeHouse) -> None:
    house.lifecycle.workers[-1].die()
    await asyncio.sleep(0)


async def execute(house: FakeHouse, statement: str) -> None:
    async with house.db.write() as session:
        await session.execute(text(statement))


async def test_a_damaged_snapshot_falls_back_to_the_one_before(house: FakeHouse, tmp_path: Path) -> None:
    done = [train(1), STEP, train(2), STEP, train(3)]
    for position, operation in enumerate(done, 1):
        await do(house, operation)
        if position in (2, 4):
            await house.scheduler.suspend("deploy")
    flip(tmp_path / f"snapshots/{RUN_ID}/0-4/state.json")
    await kill(house)
    assert await do(house, STEP) == StepResult({"step": 3.0, "weights": weights_after(*done, STEP)})
    # From then on the older one is the newest, and two are kept again after the next.
    await house.scheduler.suspend("deploy")
    run = await house.run()
    assert (run.older_key, run.snapshot_key) == (f"snapshots/{RUN_ID}/0-2", f"snapshots/{RUN_ID}/0-6")


async def test_a_first_snapshot_falls_back_to_the_start(house: FakeHouse, tmp_path: Path) -> None:
    await do(house, train(1), STEP)
    await house.scheduler.suspend("deploy")
    for file in (tmp_path / f"snapshots/{RUN_ID}/0-2").iterdir():
        file.unlink()
    (tmp_path / f"snapshots/{RUN_ID}/0-2").rmdir()
    await kill(house)
    assert await do(house, STEP) == StepResult({"step": 2.0, "weights": weights_after(train(1), STEP, STEP)})


async def test_where_neither_can_be_used_both_are_named(house: FakeHouse, tmp_path: Path) -> None:
    for _ in range(2):
        await do(house, train(1), STEP)
        await house.scheduler.suspend("deploy")
    for name in ("0-2", "0-4"):
        flip(tmp_path / f"snapshots/{RUN_ID}/{name}/state.json")
    await kill(house)
    error = await fails(house, STEP)
    assert f"snapshots/{RUN_ID}/0-4/state.json"[-20:] in error
    assert "0-2/state.json is damaged" in error
    # Whatever comes next fails as fast, and nothing is computed on a state that is not the run's.
    assert "could not be rebuilt" in await fails(house, STEP)


async def test_a_loaded_state_is_stored_twice(house: FakeHouse, tmp_path: Path) -> None:
    await do(house, train(3), STEP, SaveState("ckpt001", "first"), STEP)
    await do(house, LoadState(f"bt://loops:{RUN_ID}/weights/first", with_optimizer=True))
    # What was loaded is replaced: it must not be loaded again.
    await do(house, STEP, SaveState("ckpt002", "first"))
    flip(tmp_path / f"snapshots/{RUN_ID}/0-5/state.json")
    await kill(house)
    assert await do(house, STEP) == StepResult({"step": 3.0, "weights": weights_after(train(3), STEP, STEP, STEP)})


@pytest.mark.parametrize("harm", [flip, Path.unlink])
async def test_a_payload_that_is_not_what_was_accepted_ends_the_recovery_at_once(
    house: FakeHouse, tmp_path: Path, harm
) -> None:
    await do(house, train(1), train(2), train(3))
    (path,) = (tmp_path / "journal" / RUN_ID).glob("op2-*.op")
    harm(path)
    await kill(house)
    error = await fails(house, STEP)
    assert "forward_backward (seq_id 2, operation op2)" in error
    assert path.name in error
    assert house.lifecycle.workers[-1].executed == [], "nothing was computed for nothing"


async def test_a_queued_payload_that_is_damaged_fails_its_operation_alone(house: FakeHouse, tmp_path: Path) -> None:
    await house.submit(train(1), 2, "op2")
    await house.submit(STEP, 3, "op3")
    (path,) = (tmp_path / "journal" / RUN_ID).glob("op2-*.op")
    flip(path)
    await house.submit(STEP, 1, "op1")
    assert (await outcome(house, "op2")).error_class == "RecoveryFailed"
    assert (await outcome(house, "op3")).result is not None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE operations SET payload = CAST(replace(payload, 'value', 'valuf') AS BLOB) WHERE id = 'op2'",
        "UPDATE operations SET payload = CAST(payload AS TEXT) WHERE id = 'op2'",
        "UPDATE operations SET payload = NULL WHERE id = 'op2'",
        "UPDATE operations SET kind = 'optim_step' WHERE id = 'op2'",
        "UPDATE operations SET seq = 20 WHERE id = 'op2'",
        "UPDATE operations SET epoch = 1 WHERE id = 'op2'",
        "UPDATE operations SET state = 'dona' WHERE id = 'op2'",
        "UPDATE operations SET payload_digest = 'f' || substr(payload_digest, 2) || 'x' WHERE id = 'op2'",
        "DELETE FROM operations WHERE id = 'op2'",
        "UPDATE runs SET seed = seed + 1",
        "UPDATE runs SET initial_rank = 9",
        "UPDATE runs SET targets = 'mlp'",
        "UPDATE runs SET snapshot_seq = 2",
        "UPDATE runs SET num_changes = 2",
        "UPDATE runs SET snapshot_key = 'snapshots/run0001/0-2'",
    ],
)
async def test_a_row_that_changed_is_noticed_before_anything_is_computed(tmp_path: Path, statement: str) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=1000.0))
    await do(house, small(1), small(2), small(3))
    await house.crash()
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=1000.0))
    await execute(house, statement)
    await house.crash()
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=1000.0))
    await fails(house, STEP)
    assert all(worker.executed == [] for worker in house.lifecycle.workers)
    await house.crash()


async def test_a_damaged_load_that_waits_needs_no_checkpoint_and_fails_with_its_turn(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings())
    await house.submit(LoadState(f"bt://loops:{RUN_ID}/weights/first", with_optimizer=True), 2, "op2")
    await execute(house, "UPDATE operations SET payload = CAST(substr(payload, 1, 9) AS BLOB)")
    await house.crash()
    house = await FakeHouse.open(tmp_path, QueueSettings())
    async with house.db.read() as session:
        assert (await retention.needs(session)).by_address == {}
    actor = house.scheduler.known(RUN_ID)
    assert actor is not None
    assert not actor.saves_named("first", LoadState)
    await house.submit(STEP, 1, "op1")
    assert (await outcome(house, "op2")).error_class == "RecoveryFailed"
    await house.crash()


async def test_a_damaged_result_is_not_given_out(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings())
    await do(house, small(1))
    await execute(house, "UPDATE operations SET result = CAST(replace(result, 'loss', 'lost') AS BLOB)")
    await house.crash()
    house = await FakeHouse.open(tmp_path, QueueSettings())
    found = await outcome(house, "op1")
    assert (found.result, found.error_class) == (None, "ResultLost")
    assert "forward_backward (seq_id 1) was carried out" in (found.error or "")
    await house.crash()


async def test_runs_of_before_there_were_digests_go_on(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=1000.0))
    await do(house, train(1), STEP, small(2))
    await execute(house, "UPDATE operations SET payload_digest = NULL, result_digest = NULL")
    await execute(house, "UPDATE runs SET num_changes = NULL, digest = NULL")
    await house.crash()
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=1000.0))
    assert (await outcome(house, "op3")).result is not None
    expected = weights_after(train(1), STEP, small(2), STEP)
    assert await do(house, STEP) == StepResult({"step": 2.0, "weights": expected})
    await house.crash()
