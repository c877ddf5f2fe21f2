"""Whatever dies and whenever: an accepted sample has exactly one outcome, and it stays."""

import asyncio
import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_sampling import SAMPLER_ID, FakeSamplingHouse, spec_of
from selfloop.control.sampling.queued_samples import Failed, Sampled
from selfloop.control.sampling.service import Weights
from selfloop.types.errors import Conflict

IDS = ["a", "b", "c", "d"]
actions = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), st.sampled_from(IDS), st.sampled_from([None, 1, 2])),
        st.tuples(st.just("accept long"), st.sampled_from(IDS), st.just(None)),
        st.tuples(st.just("accept other"), st.sampled_from(IDS), st.just(None)),
        st.tuples(st.just("cancel"), st.sampled_from(IDS), st.just(None)),
        st.tuples(st.just("look"), st.sampled_from(IDS), st.just(None)),
        st.tuples(st.just("hold"), st.just(""), st.just(None)),
        st.tuples(st.just("turns"), st.just(""), st.integers(1, 40)),
        st.tuples(st.just("kill gateway"), st.just(""), st.just(None)),
    ),
    max_size=14,
)


@settings(max_examples=30)
@given(plan=actions)
def test_one_outcome_that_stays(plan: list[tuple[str, str, int | None]]) -> None:
    asyncio.run(_play(plan))


class _Model:
    """What the callers know."""

    def __init__(self) -> None:
        self.kind: dict[str, str] = {}
        self.seed: dict[str, int | None] = {}
        self.cancelled: set[str] = set()
        self.seen: dict[str, Sampled | Failed] = {}

    def check(self, id: str, outcome: Sampled | Failed) -> None:
        assert outcome == self.seen.setdefault(id, outcome)
        if isinstance(outcome, Failed):
            assert outcome.error_class == "Cancelled"
            assert id in self.cancelled
            return
        assert id not in self.cancelled
        assert outcome.request.spec.params.seed is not None
        if self.seed[id] is not None:
            assert outcome.request.spec.params.seed == self.seed[id]
        sampled_from = outcome.result.sequences[0].tokens[-2:]
        assert sampled_from == [outcome.request.spec.params.seed % 2**31, 7]


async def _play(plan: list[tuple[str, str, int | None]]) -> None:
    model = _Model()
    with tempfile.TemporaryDirectory() as name:
        house = await FakeSamplingHouse.open(Path(name))
        for what, id, value in plan:
            match what:
                case "accept" | "accept long" | "accept other":
                    await _accept(house, model, what, id, value)
                case "cancel" if id in model.kind:
                    with contextlib.suppress(Conflict):
                        await house.queue.cancel(SAMPLER_ID, id)
                        model.cancelled.add(id)
                case "look" if id in model.kind:
                    outcome = await house.queue.wait(SAMPLER_ID, id, 0.0)
                    if isinstance(outcome, Sampled | Failed):
                        model.check(id, outcome)
                case "hold":
                    house.sampling.gate.clear()
                case "turns":
                    for _ in range(value or 0):
                        await asyncio.sleep(0)
                case "kill gateway":
                    await house.crash()
                    house = await FakeSamplingHouse.open(Path(name))
                case _:
                    pass
        house.sampling.gate.set()
        for _ in range(2):
            for id in model.kind:
                outcome = await house.queue.wait(SAMPLER_ID, id, 20.0)
                assert isinstance(outcome, Sampled | Failed), outcome
                model.check(id, outcome)
            await house.crash()
            house = await FakeSamplingHouse.open(Path(name))
        await house.crash()


async def _accept(house: FakeSamplingHouse, model: _Model, what: str, id: str, seed: int | None) -> None:
    spec = spec_of(len(what), seed, 20_000 if what == "accept long" else 1)
    kind = f"{what} {seed}"
    if model.kind.get(id, kind) == kind:
        assert await house.accept(spec, id, kind, Weights(None, 7)) == id
        model.kind[id] = kind
        model.seed.setdefault(id, seed)
        return
    with pytest.raises(Conflict, match=f"Idempotency-Key {id} "):
        await house.accept(spec, id, kind, Weights(None, 7))
