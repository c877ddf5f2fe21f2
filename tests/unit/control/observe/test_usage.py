"""Usage counts every finished operation once, whatever crashes, and goes to who asked."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fake_house import RUN_ID, FakeHouse
from selfloop.control.observe.usage import Counts, Usage, UsageKey, UsageLine, as_rows, counts_of
from selfloop.control.resources.access import Caller
from selfloop.storage.db import queries_observations
from selfloop.storage.db.tables import OperationRow, SamplerRow
from selfloop.types.logline import Scope, bound
from selfloop.types.operation import AdamParams, ForwardBackward, Operation, OptimStep
from selfloop.types.result import LossResult, Spent, StepResult
from selfloop.types.sampling import SampledSequence, SampleResult


def backward(value: int) -> Operation:
    return ForwardBackward([], "cross_entropy", {"value": value})


async def outcome(house: FakeHouse, id: str) -> None:
    await house.operations.wait(RUN_ID, id, 10)


async def total(house: FakeHouse) -> Counts:
    lines = await house.outcomes.observer.usage.report(None, "run")
    return lines[0].counts if lines else Counts()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[FakeHouse]:
    made = await FakeHouse.open(tmp_path)
    yield made
    await made.crash()


def operation_row(kind: str) -> OperationRow:
    return OperationRow(run_id="r", id="o", epoch=0, seq=1, kind=kind, fingerprint="", state="done", created_at=0.0)


def test_only_backward_passes_train():
    result = LossResult(0.0, [], {"num_trained_tokens": 7.0}, spent=Spent(0.5, 10))
    assert counts_of(operation_row("forward_backward"), result) == Counts(
        operations=1, tokens_trained=7, tokens_forwarded=10, compute_s=0.5
    )
    assert counts_of(operation_row("forward"), result).tokens_trained == 0
    assert counts_of(operation_row("optim_step"), StepResult({"step": 1.0})) == Counts(operations=1)


async def test_each_operation_counts_once_through_crashes_and_replays(tmp_path: Path):
    house = await FakeHouse.open(tmp_path)
    for seq in range(1, 4):
        await house.submit(backward(seq), seq, f"op{seq}")
        await outcome(house, f"op{seq}")
    assert (await total(house)).operations == 3
    await house.crash()

    house = await FakeHouse.open(tmp_path)
    await house.submit(OptimStep(AdamParams()), 4, "op4")
    await outcome(house, "op4")
    assert len(house.lifecycle.workers[-1].executed) == 4, "the first three were replayed"
    assert (await total(house)).operations == 4
    await house.submit(backward(1), 1, "op1")
    assert (await total(house)).operations == 4
    await house.crash()


async def test_settling_twice_counts_once(house: FakeHouse):
    await house.submit(backward(1), 1, "op1")
    await outcome(house, "op1")
    row = await house.journal.get(RUN_ID, "op1")
    assert row is not None
    from msgspec.msgpack import encode

    await house.outcomes.done(await house.run(), row, encode(LossResult(0.0, [], {}, spent=Spent(9.0, 9))))
    assert (await total(house)) == Counts(operations=1)


async def test_an_operation_goes_to_the_key_that_sent_it(house: FakeHouse):
    with bound(Scope(team_id="team", key_id="other")):
        await house.submit(backward(1), 1, "op1")
    await house.submit(backward(2), 2, "op2")
    await outcome(house, "op2")
    usage = house.outcomes.observer.usage
    by_key = {line.id: line.counts.operations for line in await usage.report(None, "key")}
    assert by_key == {"other": 1, "key": 1}
    own = await usage.report(Caller("team", "key", "k"), "run", whole_team=False)
    assert [line.counts.operations for line in own] == [1]
    assert await usage.report(Caller("elsewhere", "key", "k"), "run") == []


async def test_sampling_adds_up_to_the_hour_and_is_written_once(house: FakeHouse):
    usage = Usage(house.db)
    sampler = SamplerRow(
        id="s", session_id="session", team_id="team", key_id="key", base_model="m", model_name="m", model_id="m",
        deployment_id="d", max_seq_len=9, scale_down_delay_s=9, status="ACTIVE", created_at=0.0, run_id=RUN_ID,
    )  # fmt: skip
    sequence = SampledSequence([1, 2, 3], [0.0] * 3, "stop", "")
    for _ in range(3):
        usage.sampled(sampler, None, 5, SampleResult("x", [sequence, sequence], spent=Spent(0.5)))
    with bound(Scope(team_id="elsewhere", key_id="stranger")):
        usage.sampled(sampler, None, 5, SampleResult("x", [sequence], spent=Spent(0.5)))
    await usage.flush()
    await usage.flush()
    (line,) = await usage.report(None, "run")
    assert (line.id, line.label) == (RUN_ID, "run")
    assert line.counts == Counts(samples=4, tokens_prefilled=20, tokens_sampled=21, compute_s=2.0)
    assert [line.id for line in await usage.report(None, "key")] == ["key"]


async def test_hours_are_chosen_by_their_start(house: FakeHouse):
    async with house.db.write() as session:
        for hour in (0, 3600, 7200):
            for _ in range(2):
                key = UsageKey("team", hour, "key", RUN_ID, "")
                await queries_observations.add_usage(session, key, Counts(operations=1))
    usage = house.outcomes.observer.usage

    async def operations(start: float | None, end: float | None) -> int:
        return sum(line.counts.operations for line in await usage.report(None, "team", start=start, end=end))

    assert await operations(None, None) == 6
    assert await operations(3700, None) == 4
    assert await operations(None, 3600) == 2
    assert await operations(3600, 7200) == 2


def test_the_report_for_programs():
    text = json.dumps(as_rows([UsageLine("r", "my run", Counts(operations=2), 5)], "run"))
    assert '"run_id": "r"' in text
    assert '"operations": 2' in text
    assert '"checkpoint_bytes": 5' in text
