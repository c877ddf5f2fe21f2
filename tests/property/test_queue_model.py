"""Against a reference that just folds the operations in order: any arrival, retries, deaths and restarts."""

import asyncio
import tempfile
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_house import RUN_ID, FakeHouse
from fake_worker import FakeState
from selfloop.control.queue.outcomes import Outcome
from selfloop.types.operation import AdamParams, ForwardBackward, Operation, OptimStep
from selfloop.types.result import Result
from selfloop.types.settings import QueueSettings

operations = st.lists(
    st.one_of(
        st.integers(0, 9).map(lambda v: ForwardBackward([], "cross_entropy", {"value": float(v)})),
        st.just(OptimStep(AdamParams())),
    ),
    min_size=1,
    max_size=12,
)
# After each submission: nothing, the client retries it, the worker dies, the gateway dies.
events = st.lists(
    st.sampled_from(["", "", "retry", "kill worker", "kill gateway", "suspend"]), min_size=12, max_size=12
)


@settings(max_examples=40)
@given(plan=operations, order=st.randoms(use_true_random=False), what=events, every=st.sampled_from([0.0, 60.0]))
def test_every_operation_once_and_in_order(plan: list[Operation], order: object, what: list[str], every: float) -> None:
    arrival = list(range(1, len(plan) + 1))
    order.shuffle(arrival)  # type: ignore[attr-defined]
    asyncio.run(_play(plan, arrival, what, QueueSettings(snapshot_every_s=every)))


async def _play(plan: list[Operation], arrival: list[int], what: list[str], config: QueueSettings) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        house = await FakeHouse.open(folder, config)
        for seq, event in zip(arrival, what, strict=False):
            await house.submit(plan[seq - 1], seq, f"op{seq}")
            match event:
                case "retry":
                    assert await house.submit(plan[seq - 1], seq, f"op{seq}") == f"op{seq}"
                case "kill worker" if house.lifecycle.workers:
                    house.lifecycle.workers[-1].die()
                case "suspend":
                    await house.scheduler.suspend("deploy")
                case "kill gateway":
                    await house.crash()
                    house = await FakeHouse.open(folder, config)
                case _:
                    await asyncio.sleep(0)
            if (actor := house.scheduler.known(RUN_ID)) is not None:
                actor.queue.check_integrity()
        reference = FakeState(weights=8)
        for seq, operation in enumerate(plan, start=1):
            outcome = await house.operations.wait(RUN_ID, f"op{seq}", 20.0)
            assert isinstance(outcome, Outcome), (seq, outcome)
            assert outcome.result is not None, outcome.error
            assert msgspec.msgpack.decode(outcome.result, type=Result) == reference.apply(operation)
        assert (await house.run()).step == reference.step
        await house.crash()
