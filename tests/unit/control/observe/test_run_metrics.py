"""The numbers of a run's operations: kept once each, whatever crashes, and gone with the run."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fake_house import RUN_ID, FakeHouse
from selfloop.control.observe.measurements import measured_by, values_of
from selfloop.control.observe.run_metrics import Curves, Point, RunMetrics
from selfloop.control.resources.access import Caller
from selfloop.control.resources.runs import Runs
from selfloop.control.resources.user_config import UserConfigs
from selfloop.storage.db import queries_metrics, queries_prune, queries_resources
from selfloop.storage.db.queries_metrics import Measurement
from selfloop.storage.db.tables import OperationRow
from selfloop.types.errors import NotFound
from selfloop.types.operation import AdamParams, Forward, ForwardBackward, OptimStep
from selfloop.types.result import InitResult, LossResult, Result, Spent, StepResult

OWNER = Caller("team", "key", "k")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[FakeHouse]:
    made = await FakeHouse.open(tmp_path)
    yield made
    await made.crash()


def metrics_of(house: FakeHouse) -> RunMetrics:
    return RunMetrics(house.context, Runs(house.context, UserConfigs(house.context, "cpu")))


async def curves(house: FakeHouse, **asked: object) -> Curves:
    return await metrics_of(house).curves(OWNER, RUN_ID, **asked)  # type: ignore[arg-type]


async def train(house: FakeHouse, *values: int) -> None:
    """A forward_backward and an optim_step each."""
    for value in values:
        for operation, name in (
            (ForwardBackward([], "cross_entropy", {"value": value}), "b"),
            (OptimStep(AdamParams()), "s"),
        ):
            id = f"{name}{value}"
            await house.submit(operation, None, id)
            await house.operations.wait(RUN_ID, id, 10)


async def add(house: FakeHouse, *values: float) -> None:
    """Measurements of a loss, as they are stored."""
    run = await house.run()
    async with house.db.write() as session:
        for value in values:
            metrics = {"num_trained_tokens": 1.0, "custom/x:sum": value}
            measured = measured_by(run, row("forward_backward"), LossResult(1.0, [], metrics), 5.0)
            assert measured is not None
            await queries_metrics.add(session, run.id, measured)


def row(kind: str) -> OperationRow:
    return OperationRow(run_id="r", id="o", epoch=0, seq=1, kind=kind, fingerprint="", state="done", created_at=2.0)


async def measured(house: FakeHouse, kind: str, result: Result) -> tuple[int, dict[str, float]]:
    found = measured_by(await house.run(), row(kind), result, now=5.0)
    assert found is not None
    return found.step, values_of(found)


async def test_a_mean_loss_and_a_summed_one_say_the_same(house: FakeHouse):
    spent = Spent(2.0, 10)
    mean = LossResult(0.5, [], {"loss": 0.5, "num_trained_tokens": 4.0, "kl_sampler_trainer": 0.1}, spent=spent)
    step, values = await measured(house, "forward_backward", mean)
    assert step == 1
    assert values == {
        "train/loss_mean": 0.5,
        "train/loss_sum": 2.0,
        "train/supervised_tokens": 4.0,
        "train/kl_sampler_trainer": 0.1,
        "train/tokens": 10.0,
        "train/tokens_per_s": 5.0,
        "train/compute_s": 2.0,
        "train/wait_s": 1.0,
    }
    metrics = {"num_trained_tokens": 4.0, "skip_token_normalization": 1.0, "kl_sampler_trainer": 0.1}
    summed = LossResult(2.0, [], metrics, spent=spent)
    assert await measured(house, "forward_backward", summed) == (1, values)


async def test_pairs_are_what_a_preference_loss_is_the_mean_of(house: FakeHouse):
    result = LossResult(0.25, [], {"num_trained_tokens": 40.0, "num_trained_pairs": 8.0, "margin": 1.0})
    _, values = await measured(house, "forward", result)
    assert values["forward/loss_sum"] == 2.0
    assert (values["forward/loss_mean"], values["forward/pairs"], values["forward/margin"]) == (0.25, 8.0, 1.0)


async def test_a_loss_without_a_trained_token_has_no_mean(house: FakeHouse):
    _, values = await measured(house, "forward", LossResult(0.0, [], {"num_trained_tokens": 0.0}))
    assert "forward/loss_mean" not in values
    assert values["forward/loss_sum"] == 0.0


async def test_an_optimizer_step_has_its_norm_and_rate(house: FakeHouse):
    metrics = {"step": 3.0, "learning_rate": 1e-4, "lr": 1e-4, "grad_norm": 0.7, "num_trained_tokens": 9.0}
    step, values = await measured(house, "optim_step", StepResult(metrics, spent=Spent(0.5)))
    assert step == 3
    assert values == {
        "optim/learning_rate": 1e-4,
        "optim/grad_norm": 0.7,
        "optim/supervised_tokens": 9.0,
        "optim/compute_s": 0.5,
        "optim/wait_s": 2.5,
    }


async def test_other_operations_measure_nothing(house: FakeHouse):
    assert measured_by(await house.run(), row("init_trainer_server"), InitResult(0, 8), 5.0) is None


async def test_each_operation_is_kept_once_through_crashes_and_replays(tmp_path: Path):
    house = await FakeHouse.open(tmp_path)
    await train(house, 1, 2)
    await house.crash()
    house = await FakeHouse.open(tmp_path, dies_at=2)
    await train(house, 3)
    found = {series.name: series for series in (await curves(house)).series}
    assert found["train/value"].values == [1.0, 2.0, 3.0]
    assert found["train/value"].numbers == [1, 3, 5]
    assert found["train/value"].steps == [1, 2, 3]
    assert found["optim/weights"].numbers == [2, 4, 6]
    assert found["optim/weights"].steps == [1, 2, 3]
    await house.crash()


async def test_what_fails_measures_nothing(house: FakeHouse):
    await house.submit(Forward([], "fails", {"value": 1}), 1, "op")
    await house.operations.wait(RUN_ID, "op", 10)
    assert await curves(house) == ([], 0, None)


async def test_curves_come_in_parts(house: FakeHouse):
    await train(house, 1, 2, 3)
    seen: list[float | None] = []
    after: int | None = 0
    while after is not None:
        part = await curves(house, names={"train/value"}, after=after, limit=4)
        assert [series.name for series in part.series] == ["train/value"]
        seen += part.series[0].values
        after = part.next_after
    assert seen == [1.0, 2.0, 3.0]
    assert (await curves(house, limit=6)).next_after is None
    assert (await curves(house, names={"none/such"})).series == []


async def test_few_points_keep_both_ends_and_peaks(house: FakeHouse):
    await add(house, *(100.0 if place == 57 else math.sin(place / 30) for place in range(200)), math.nan)
    (series,) = (await curves(house, names={"train/custom/x:sum"}, num_points=20)).series
    assert len(series.values) == len(series.numbers) == len(series.steps) == len(series.times) == 20
    assert (series.numbers[0], series.numbers[-1]) == (1, 200)
    assert max(value or 0.0 for value in series.values) == 100.0
    (whole,) = (await curves(house, names={"train/custom/x:sum"})).series
    assert len(whole.values) == 201
    assert whole.values[-1] is None


async def test_another_team_finds_no_run(house: FakeHouse):
    stranger = Caller("other", "other-key", "k")
    with pytest.raises(NotFound):
        await metrics_of(house).curves(stranger, RUN_ID)
    with pytest.raises(NotFound):
        await anext(metrics_of(house).follow(stranger, RUN_ID, 0, 1.0))


async def test_a_stream_has_what_was_and_what_comes_and_ends_with_the_run(house: FakeHouse):
    await train(house, 1)
    points: list[Point] = []

    async def watch() -> None:
        async for fresh in metrics_of(house).follow(OWNER, RUN_ID, 0, 60.0):
            points.extend(fresh.points)

    watching = asyncio.create_task(watch())
    await train(house, 2)
    async with house.db.write() as session:
        await queries_resources.update_run(session, RUN_ID, status="INACTIVE")
    house.outcomes.measured.announce(RUN_ID)
    await asyncio.wait_for(watching, 10)
    assert [point.number for point in points] == [1, 2, 3, 4]
    assert [point.kind for point in points] == ["forward_backward", "optim_step"] * 2
    assert points[2].values["train/value"] == 2.0


async def test_a_stream_ends_after_its_time_and_with_the_server(house: FakeHouse):
    await train(house, 1)
    at_once = [fresh async for fresh in metrics_of(house).follow(OWNER, RUN_ID, 1, 0.0)]
    assert [([point.number for point in points], is_last) for points, is_last in at_once] == [([2], False)]
    stream = metrics_of(house).follow(OWNER, RUN_ID, 2, 60.0)
    assert await anext(stream) == ([], False)
    going = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    metrics_of(house).stop()
    assert await asyncio.wait_for(going, 10) == ([], False)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_what_a_run_measured_goes_with_it(house: FakeHouse):
    await train(house, 1)
    steps = [step for step in queries_prune.steps_of_runs([RUN_ID]) if step.table.__tablename__ == "run_metrics"]
    async with house.db.write() as session:
        for table, where in steps:
            await session.execute(table.__table__.delete().where(where))  # type: ignore[attr-defined]
    assert (await curves(house)).series == []


def test_what_is_stored_is_small():
    """Of a policy loss, in bytes."""
    names = ("sampler_logprob_gap", "kl_sampler_trainer", "advantage_mean")
    metrics = {"num_trained_tokens": 1000.0, **dict.fromkeys(names, 0.1)}
    run = type("Run", (), {"step": 1, "id": RUN_ID})()
    found = measured_by(run, row("forward_backward"), LossResult(0.1, [], metrics, spent=Spent(0.1, 9)), time.time())
    assert isinstance(found, Measurement)
    assert len(found.data) < 300
