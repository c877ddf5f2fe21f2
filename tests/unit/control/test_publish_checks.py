"""After a publish the sampler's logprobs of a short text are compared with the trainer's."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from fake_house import RUN_ID, FakeHouse
from fake_worker import FakeWorker
from selfloop.control.observe import instruments
from selfloop.control.queue.operations import Outcome
from selfloop.control.sampling.publish_checks import PublishChecks
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import OperationFailed
from selfloop.types.logline import current
from selfloop.types.operation import AdamParams, ForwardBackward, OptimStep, SaveWeightsForSampler
from selfloop.types.result import Probe, SaveResult
from selfloop.types.settings import QueueSettings

PROBE = Probe([1, 5, 9], [-1.0, -2.0], bound=0.2)


class CheckedHouse(FakeHouse):
    """A house that compares what is published; the worker says what the trainer and the sampler make of it."""

    def __init__(self, folder: Path, config: QueueSettings) -> None:
        super().__init__(folder, config)
        self.checks = PublishChecks(
            self.store,
            self.outcomes.observer.meter,
            lambda _name: next((w for w in self.lifecycle.workers if not w.lost.done()), None),  # type: ignore[arg-type]
        )

    def saved(self, run: RunRow, result: SaveResult) -> None:
        self.checks.begin(run, result)

    async def check(self, scores: list[float] | OperationFailed, probe: Probe = PROBE) -> FakeWorker:
        """Publish once, and see the comparison to its end."""
        worker = await self.lifecycle.wake("")
        worker.probe, worker.scores = probe, scores
        await self.publish(1)
        await self.compared()
        return worker

    async def publish(self, seq: int) -> None:
        name = f"saved{seq}"
        await self.submit(SaveWeightsForSampler(name, name, publish=True), seq, name)
        outcome = await self.operations.wait(RUN_ID, name, 10.0)
        assert isinstance(outcome, Outcome)
        assert outcome.error is None

    async def compared(self) -> None:
        while tasks := [t for t in asyncio.all_tasks() if t.get_name() == f"check-publish-{RUN_ID}"]:
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    def gap(self) -> float | None:
        """The largest of the run's deployment."""
        minutes = self.outcomes.observer.meter.take_all()
        gaps = [minute.publish_gap for id, _, minute in minutes if id == "deploy" and minute.publish_gap is not None]
        return max(gaps, default=None)


@pytest.fixture
async def house(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncGenerator[CheckedHouse]:
    house = await CheckedHouse.open(tmp_path)
    assert isinstance(house, CheckedHouse)
    caplog.handler.addFilter(_with_scope)
    yield house
    caplog.handler.removeFilter(_with_scope)
    await house.checks.stop()
    await house.crash()


def _with_scope(record: logging.LogRecord) -> bool:
    record.about = current()
    return True


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Those in the run's log."""
    found = [
        r
        for r in caplog.records
        if r.levelno == logging.WARNING and r.name == "selfloop.control.sampling.publish_checks"
    ]
    for record in found:
        scope = record.__dict__["about"]
        assert (scope.team_id, scope.deployment_id, scope.run_id) == ("team", "deploy", RUN_ID)
    return [record.getMessage() for record in found]


def total() -> tuple[float, float]:
    value = instruments.REGISTRY.get_sample_value
    return value("selfloop_publish_logprob_gap_count") or 0, value("selfloop_publishes_out_of_bounds_total") or 0


async def test_a_sampler_that_agrees_is_measured_and_not_warned_of(house, caplog):
    count, beyond = total()
    worker = await house.check([-1.1, -1.9])
    (asked,) = worker.scored
    assert (asked.prompt, asked.prompt_logprobs, asked.adapter.checkpoint_id) == ([1, 5, 9], 0, "saved1")
    assert house.gap() == pytest.approx(0.1)
    assert total() == (count + 1, beyond)
    assert warnings(caplog) == []


async def test_a_sampler_that_serves_other_weights_is_named_in_the_runs_log(house, caplog):
    count, beyond = total()
    await house.check([-1.5, -3.5])
    assert house.gap() == pytest.approx(1.0)
    assert total() == (count + 1, beyond + 1)
    (said,) = warnings(caplog)
    assert "checkpoint 'saved1' of step 0: by 1 nats a token in the mean, at most 0.2 is rounding" in said


@pytest.mark.parametrize(
    ("trainer", "sampler"),
    [
        ([math.nan, math.nan], [-1.0, -2.0]),
        ([-1.0, -2.0], [-1.0, -math.inf]),
        ([-1.0, -2.0], OperationFailed("the logits are not finite", "NonFiniteLogits")),
    ],
)
async def test_what_is_not_finite_is_out_of_bounds(house, caplog, trainer, sampler):
    count, beyond = total()
    await house.check(sampler, Probe([1, 5, 9], trainer, 0.2))
    assert house.gap() is None
    assert total() == (count, beyond + 1)
    (said,) = warnings(caplog)
    assert "sampler and trainer differ after the publish" in said


async def test_weights_that_equal_the_base_model_are_named_in_the_runs_log(house, caplog):
    await house.check([-1.0, -2.0], Probe([1, 5, 9], [-1.0, -2.0], 0.2, equals_base=True))
    assert house.gap() == 0.0
    (said,) = warnings(caplog)
    assert "equal the base model: checkpoint 'saved1'" in said


async def test_a_sampler_that_cannot_answer_fails_nothing(house, caplog):
    count, beyond = total()
    await house.check(OperationFailed("no room", "BadRequest"))
    assert (total(), house.gap()) == ((count, beyond), None)
    (said,) = warnings(caplog)
    assert "could not be compared" in said


async def test_what_is_replayed_is_not_compared_again(house):
    """The worker dies after the publish: its successor takes the run up again, and nobody asks it about old weights."""
    await house.submit(ForwardBackward([], "fine", {"value": 3.0}), 1, "loss")
    await house.submit(OptimStep(AdamParams()), 2, "step")
    first = await house.lifecycle.wake("")
    first.probe, first.scores = PROBE, [-1.0, -2.0]
    await house.publish(3)
    await house.compared()
    assert len(first.scored) == 1
    first.die()
    await house.submit(ForwardBackward([], "fine", {"value": 4.0}), 4, "after")
    assert isinstance(await house.operations.wait(RUN_ID, "after", 10.0), Outcome)
    await house.compared()
    second = house.lifecycle.workers[-1]
    assert second is not first
    assert second.scored == []


async def test_the_newest_publish_is_compared_and_none_without_a_worker(house):
    """Nothing is woken for it; of two publishes in a row the second one counts."""
    run: RunRow = await house.run()
    saved = SaveResult("gone", "gone", "sampler", 1, 8, 32.0, 1, PROBE)  # type: ignore[arg-type]
    house.checks.begin(run, saved)
    assert house.lifecycle.workers == []
    worker = await house.lifecycle.wake("")
    worker.scores = [-1.0, -2.0]
    folder = house.blobs.path("checkpoints/newest")
    folder.mkdir(parents=True)
    house.checks.begin(run, saved)
    house.checks.begin(run, SaveResult("newest", "newest", "sampler", 1, 8, 32.0, 1, PROBE))  # type: ignore[arg-type]
    await house.compared()
    assert [request.adapter.checkpoint_id for request in worker.scored] == ["newest"]
    await house.checks.stop()


async def test_the_end_of_the_worker_ends_the_comparison(house):
    worker = await house.lifecycle.wake("")
    worker.probe = PROBE
    asked: list[object] = []

    def call(command: object, payload: bytes = b"") -> "asyncio.Future[bytes]":
        if type(command).__name__ != "Sample":
            return FakeWorker.call(worker, command, payload)  # type: ignore[arg-type]
        asked.append(command)
        worker.die()
        return FakeWorker.call(worker, command, payload)  # type: ignore[arg-type]

    worker.call = call
    await house.publish(1)
    await house.compared()
    assert len(asked) == 1
    assert house.gap() is None
