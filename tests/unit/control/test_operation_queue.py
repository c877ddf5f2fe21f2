"""The operation queue: order, exactly once, recovery, reasons."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest

from fake_house import RUN_ID, FakeHouse
from fake_worker import FakeState
from selfloop.control.queue.operations import Pending
from selfloop.control.queue.outcomes import Outcome
from selfloop.storage.db.tables import CheckpointRow
from selfloop.types.errors import Conflict, NotFound, OperationFailed
from selfloop.types.operation import (
    AdamParams,
    ForwardBackward,
    InitTrainer,
    LoadState,
    Operation,
    OptimStep,
    SaveState,
    SaveWeightsForSampler,
)
from selfloop.types.result import LossResult, Result, StepResult
from selfloop.types.settings import QueueSettings


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[FakeHouse]:
    house = await FakeHouse.open(tmp_path, QueueSettings(gap_grace_s=0.2))
    yield house
    await house.crash()


def forward_backward(value: int, loss_fn: str = "cross_entropy") -> ForwardBackward:
    return ForwardBackward([], loss_fn, {"value": float(value)})


STEP = OptimStep(AdamParams())


async def result(house: FakeHouse, id: str) -> Result:
    outcome = await house.operations.wait(RUN_ID, id, 10.0)
    assert isinstance(outcome, Outcome), outcome
    assert outcome.result is not None, outcome.error
    return msgspec.msgpack.decode(outcome.result, type=Result)


async def error_of(house: FakeHouse, id: str) -> Outcome:
    outcome = await house.operations.wait(RUN_ID, id, 10.0)
    assert isinstance(outcome, Outcome)
    assert outcome.result is None
    return outcome


def weights_after(*operations: Operation) -> float:
    state = FakeState(weights=8)
    for operation in operations:
        state.apply(operation)
    return float(state.weights)


async def test_runs_in_order_of_seq_whatever_the_order_of_arrival(house: FakeHouse) -> None:
    operations = [forward_backward(1), forward_backward(2), STEP]
    for seq in (3, 1, 2):
        await house.submit(operations[seq - 1], seq, f"op{seq}")
    done = await result(house, "op3")
    assert done == StepResult({"step": 1.0, "weights": weights_after(*operations)})


async def test_without_seq_ids_arrival_is_the_order(house: FakeHouse) -> None:
    operations = [forward_backward(5), STEP, forward_backward(6), STEP]
    for i, operation in enumerate(operations):
        await house.submit(operation, None, f"op{i}")
    assert await result(house, "op3") == StepResult({"step": 2.0, "weights": weights_after(*operations)})


async def test_a_retry_is_the_same_operation(house: FakeHouse) -> None:
    for _ in range(3):
        assert await house.submit(STEP, 1, "op1") == "op1"
    await result(house, "op1")
    assert await house.submit(STEP, 1, "op1") == "op1"
    await house.submit(STEP, 2, "op2")
    assert await result(house, "op2") == StepResult({"step": 2.0, "weights": weights_after(STEP, STEP)})


async def test_the_same_place_with_another_key_is_the_stored_operation(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1", fingerprint="same")
    assert await house.submit(STEP, 1, "other", fingerprint="same") == "op1"


async def test_a_used_key_or_place_with_another_request_is_refused(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1", fingerprint="a")
    with pytest.raises(Conflict, match="Idempotency-Key op1"):
        await house.submit(STEP, 2, "op1", fingerprint="b")
    with pytest.raises(Conflict, match="seq_id 1"):
        await house.submit(STEP, 1, "op2", fingerprint="b")


async def test_a_gap_that_stays_open_is_named_and_does_not_block(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    await house.submit(STEP, 3, "op3")
    waiting = await house.operations.wait(RUN_ID, "op3", 0.05)
    assert waiting == Pending("waiting for the operation with seq_id 2")
    failed = await error_of(house, "op3")
    assert failed.error_class == "MissingOperation"
    assert "seq_id 2" in (failed.error or "")
    with pytest.raises(Conflict, match="too late"):
        await house.submit(STEP, 2, "op2")
    await house.submit(STEP, 4, "op4")
    assert isinstance(await result(house, "op4"), StepResult)


async def test_a_new_client_starts_counting_anew(house: FakeHouse) -> None:
    await house.submit(InitTrainer(8), 1, "a1")
    await house.submit(STEP, 2, "a2")
    await house.submit(InitTrainer(4), 1, "b1")
    await house.submit(STEP, 2, "b2")
    assert await house.submit(InitTrainer(4), 1, "b1") == "b1"
    assert await result(house, "b2") == StepResult({"step": 1.0, "weights": 4.0 * 31})


async def test_a_failed_operation_is_reported_and_the_next_goes_on(house: FakeHouse) -> None:
    await house.submit(forward_backward(1, "fails"), 1, "op1")
    await house.submit(STEP, 2, "op2")
    failed = await error_of(house, "op1")
    assert (failed.error, failed.error_class) == ("asked to fail", "Asked")
    assert isinstance(await result(house, "op2"), StepResult)


async def test_a_model_that_cannot_be_loaded_fails_what_waits_with_the_cause(house: FakeHouse) -> None:
    house.lifecycle.failure = OperationFailed("no such folder", "LoadFailed")
    await house.submit(STEP, 1, "op1")
    assert (await error_of(house, "op1")).error == "no such folder"


async def test_cancel_takes_back_only_what_has_not_begun(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    await house.submit(STEP, 3, "op3")
    await house.operations.cancel(RUN_ID, "op3")
    assert (await error_of(house, "op3")).error_class == "Cancelled"
    await result(house, "op1")
    with pytest.raises(Conflict, match="already running or has ended"):
        await house.operations.cancel(RUN_ID, "op1")


async def test_unknown_operations_are_not_found(house: FakeHouse) -> None:
    with pytest.raises(NotFound):
        await house.operations.wait(RUN_ID, "never", 0.1)


async def test_an_operation_that_kills_its_worker_twice_is_failed_and_the_run_goes_on(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    await result(house, "op1")
    for _ in range(2):
        house.lifecycle.workers[-1].dies_at = 0
        house.lifecycle.dies_at = 1  # Replays op1, then dies on op2.
    await house.submit(STEP, 2, "op2")
    failed = await error_of(house, "op2")
    assert failed.error_class == "WorkerLost"
    await house.submit(STEP, 3, "op3")
    assert await result(house, "op3") == StepResult({"step": 2.0, "weights": weights_after(STEP, STEP)})


async def test_parking_stores_accumulated_gradients(house: FakeHouse) -> None:
    await house.submit(forward_backward(7), 1, "op1")
    await result(house, "op1")
    await house.scheduler.suspend("deploy")
    assert house.lifecycle.workers[-1].runs == {}
    assert (await house.run()).snapshot_key == f"snapshots/{RUN_ID}/0-1"
    await house.submit(STEP, 2, "op2")
    expected = weights_after(forward_backward(7), STEP)
    assert await result(house, "op2") == StepResult({"step": 1.0, "weights": expected})
    assert house.lifecycle.workers[-1].executed == [RUN_ID] * 2  # Nothing was replayed.


async def test_snapshots_follow_the_work_and_payloads_go(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=0.0))
    for seq in range(1, 6):
        await house.submit(forward_backward(seq), seq, f"op{seq}")
        await result(house, f"op{seq}")
    for _ in range(1000):
        run = await house.run()
        kept = [row.id for seq in range(1, 6) if (row := await house.journal.get(RUN_ID, f"op{seq}")) and row.payload]
        if run.snapshot_seq == 5 and kept == [f"op{seq}" for seq in range((run.older_seq or 0) + 1, 6)]:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("the payloads after the older snapshot are kept, and no others")
    assert run.older_seq
    assert sorted(f.name for f in (tmp_path / "snapshots" / RUN_ID).iterdir()) == [f"0-{run.older_seq}", "0-5"]
    await house.crash()


async def test_a_load_is_never_replayed(house: FakeHouse, tmp_path: Path) -> None:
    await house.submit(forward_backward(3), 1, "op1")
    await house.submit(STEP, 2, "op2")
    await house.submit(SaveState("ckpt001", "first"), 3, "op3")
    await house.submit(STEP, 4, "op4")
    path = f"bt://loops:{RUN_ID}/weights/first"
    await house.submit(LoadState(path, with_optimizer=True), 5, "op5")
    await result(house, "op5")
    # The checkpoint is replaced by another of the same name: recovery must not pick that one up.
    await house.submit(STEP, 6, "op6")
    await house.submit(SaveState("ckpt002", "first"), 7, "op7")
    await result(house, "op7")
    assert not (tmp_path / "checkpoints" / "ckpt001").exists()
    house.lifecycle.workers[-1].die()
    await house.submit(STEP, 8, "op8")
    expected = weights_after(forward_backward(3), STEP, STEP, STEP)
    assert await result(house, "op8") == StepResult({"step": 3.0, "weights": expected})


async def test_a_load_may_name_a_save_that_is_still_queued(house: FakeHouse) -> None:
    await house.submit(STEP, 2, "op2")
    await house.submit(SaveWeightsForSampler("ckpt001", "soon", publish=False), 3, "op3")
    path = f"bt://loops:{RUN_ID}/sampler_weights/soon"
    await house.operations.check_loadable(await house.run(), path, with_optimizer=False)
    with pytest.raises(NotFound):
        await house.operations.check_loadable(await house.run(), path.replace("soon", "never"), with_optimizer=False)


async def test_large_payloads_and_results_go_to_files(house: FakeHouse, tmp_path: Path) -> None:
    big = ForwardBackward([], "cross_entropy", {"value": 1.0, "pad" * 10_000: 1.0})
    await house.submit(big, 1, "op1")
    assert isinstance(await result(house, "op1"), LossResult)
    assert len(list((tmp_path / "journal" / RUN_ID).glob("op1-*.op"))) == 1
    await house.scheduler.suspend("deploy")
    assert len(list((tmp_path / "journal" / RUN_ID).glob("op1-*.op"))) == 1, "until there are two snapshots behind it"
    await house.submit(STEP, 2, "op2")
    await result(house, "op2")
    await house.scheduler.suspend("deploy")
    assert list((tmp_path / "journal" / RUN_ID).glob("op1-*.op")) == []


async def test_a_run_whose_state_cannot_be_rebuilt_fails_instead_of_trying_for_ever(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    await result(house, "op1")
    house.lifecycle.always_dies_at = 0
    house.lifecycle.workers[-1].die()
    await house.submit(STEP, 2, "op2")
    failed = await error_of(house, "op2")
    assert failed.error_class == "RecoveryFailed"
    house.lifecycle.always_dies_at = None
    house.lifecycle.workers[-1].die()
    await house.submit(STEP, 3, "op3")
    assert await result(house, "op3") == StepResult({"step": 2.0, "weights": weights_after(STEP, STEP)})


async def test_work_that_waited_behind_the_culprit_is_not_blamed(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    await result(house, "op1")
    for kill in range(3):
        await house.submit(STEP, 2 + kill, f"op{2 + kill}")
        house.lifecycle.workers[-1].die()
    assert isinstance(await result(house, "op4"), StepResult)


async def test_a_different_request_under_a_used_id_leaves_the_first_as_it_was(house: FakeHouse) -> None:
    first = ForwardBackward([], "cross_entropy", {"value": 1.0, "pad" * 10_000: 1.0})
    second = ForwardBackward([], "cross_entropy", {"value": 2.0, "pad" * 10_000: 1.0})
    await house.submit(OptimStep(AdamParams()), 3, "op3")
    await house.submit(first, 2, "op2", fingerprint="first")
    with pytest.raises(Conflict):
        await house.submit(second, 2, "op2", fingerprint="second")
    await house.submit(STEP, 1, "op1")
    assert await result(house, "op3") == StepResult({"step": 2.0, "weights": weights_after(STEP, first, STEP)})


async def test_a_load_of_what_is_gone_fails_alone(house: FakeHouse, tmp_path: Path) -> None:
    await house.submit(STEP, 1, "op1")
    await house.submit(SaveState("ckpt001", "soon"), 2, "op2")
    await result(house, "op2")
    await house.submit(LoadState(f"bt://loops:{RUN_ID}/weights/never", with_optimizer=True), 4, "op4")
    await house.submit(STEP, 5, "op5")
    await house.submit(STEP, 3, "op3")
    assert (await error_of(house, "op4")).error_class == "NotFound"
    assert await result(house, "op5") == StepResult({"step": 3.0, "weights": weights_after(STEP, STEP, STEP)})


async def test_a_snapshot_that_fails_costs_nothing_but_replay(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings(snapshot_every_s=0.0))
    await house.submit(STEP, 1, "op1")
    await result(house, "op1")
    house.lifecycle.workers[-1].full_disk = True
    for seq in (2, 3):
        await house.submit(STEP, seq, f"op{seq}")
        await result(house, f"op{seq}")
    await house.scheduler.suspend("deploy")
    await house.submit(STEP, 4, "op4")
    expected = weights_after(STEP, STEP, STEP, STEP)
    assert await result(house, "op4") == StepResult({"step": 4.0, "weights": expected})
    await house.crash()


async def test_a_load_that_cannot_be_kept_is_undone(house: FakeHouse) -> None:
    await house.submit(STEP, 1, "op1")
    await house.submit(SaveState("ckpt001", "first"), 2, "op2")
    await house.submit(STEP, 3, "op3")
    await result(house, "op3")
    house.lifecycle.workers[-1].full_disk = True
    await house.submit(LoadState(f"bt://loops:{RUN_ID}/weights/first", with_optimizer=True), 4, "op4")
    assert "could not be stored: no space left" in ((await error_of(house, "op4")).error or "")
    await house.submit(STEP, 5, "op5")
    assert await result(house, "op5") == StepResult({"step": 3.0, "weights": weights_after(STEP, STEP, STEP)})


async def test_what_a_crash_left_behind_is_cleared_at_start(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings())
    await house.submit(STEP, 1, "op1")
    await result(house, "op1")
    await house.scheduler.suspend("deploy")
    await house.crash()
    leftovers = ("snapshots/run0001/0-9.part", "snapshots/run0001/0-8", "snapshots/gone", "initial/gone")
    for folder in leftovers:
        (tmp_path / folder / "x").mkdir(parents=True)
    (tmp_path / "journal/run0001").mkdir(parents=True, exist_ok=True)
    (tmp_path / "journal/run0001/never.op").write_bytes(b"")
    house = await FakeHouse.open(tmp_path, QueueSettings())
    assert [child.name for child in (tmp_path / "snapshots/run0001").iterdir()] == ["0-1"]
    assert list((tmp_path / "journal/run0001").iterdir()) == []
    assert list((tmp_path / "initial").iterdir()) == []
    await house.submit(STEP, 2, "op2")
    assert await result(house, "op2") == StepResult({"step": 2.0, "weights": weights_after(STEP, STEP)})
    await house.crash()


async def test_an_expired_checkpoint_is_gone_at_once_and_its_name_is_free(house: FakeHouse) -> None:
    await house.submit(SaveState("ckpt001", "brief", ttl_seconds=3600), 1, "op1")
    await result(house, "op1")
    path, run = f"bt://loops:{RUN_ID}/weights/brief", await house.run()
    await house.operations.check_loadable(run, path, with_optimizer=True)
    async with house.db.write() as session:
        row = await session.get(CheckpointRow, "ckpt001")
        assert row is not None
        assert row.expires_at is not None
        row.expires_at -= 3601
    with pytest.raises(NotFound):
        await house.operations.check_loadable(run, path, with_optimizer=True)
    await house.submit(SaveState("ckpt002", "brief"), 2, "op2")
    await result(house, "op2")
    await house.operations.check_loadable(run, path, with_optimizer=True)
