"""A long queue holds little in memory: what it waits with is in the journal."""

from pathlib import Path

from fake_house import RUN_ID, FakeHouse
from selfloop.control.queue.outcomes import Outcome
from selfloop.types.operation import ForwardBackward
from selfloop.types.settings import QueueSettings

NUM = 200


async def test_operations_ahead_of_their_order_leave_their_bodies_in_the_journal(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path, QueueSettings(gap_grace_s=30.0))
    for seq in range(2, NUM + 1):
        # Each fails with words of its own, so that the answer shows whose body it was.
        await house.submit(ForwardBackward([], "fails", {"value": float(seq)}), seq, f"op{seq}")
    actor = house.scheduler.known(RUN_ID)
    assert actor is not None
    held = [queued.row for queued in actor.queue if queued.row.payload is not None]
    assert len(actor.queue) == NUM - 1
    assert len(held) <= 64
    await house.submit(ForwardBackward([], "fails", {"value": 1.0}), 1, "op1")
    for seq in range(1, NUM + 1):
        outcome = await house.operations.wait(RUN_ID, f"op{seq}", 30.0)
        assert isinstance(outcome, Outcome)
        assert outcome.error == "asked to fail", outcome
    await house.crash()
