"""The weights of a run for somebody beside its client: taken between its operations, whatever dies meanwhile."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from fake_house import RUN_ID, FakeHouse
from selfloop.storage.db import queries_checkpoints
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.types.operation import AdamParams, ForwardBackward, OptimStep, SaveWeightsForSampler
from selfloop.types.result import StepResult, result_decoder

STEP = OptimStep(AdamParams())


def loss(value: float) -> ForwardBackward:
    return ForwardBackward([], "fine", {"value": value})


def beside(id: str = "saved01") -> SaveWeightsForSampler:
    return SaveWeightsForSampler(id, ".sampler1", publish=False, ttl_seconds=60, sampler_id="sampler1")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[FakeHouse]:
    house = await FakeHouse.open(tmp_path)
    yield house
    await house.crash()


async def step_result(house: FakeHouse, id: str) -> StepResult:
    outcome = await house.operations.wait(RUN_ID, id, 10.0)
    result = result_decoder.decode(outcome.result)  # type: ignore[union-attr] - an outcome has one
    assert isinstance(result, StepResult)
    return result


async def test_it_takes_no_place_and_changes_nothing(house: FakeHouse):
    """Asked while operations run, and while one is missing: the weights are those of what was done before."""
    actor = await house.scheduler.actor(RUN_ID)
    await house.submit(loss(3), 1, "a")
    await house.submit(STEP, 2, "b")
    await house.submit(STEP, 4, "d")  # waits for 3
    await step_result(house, "b")
    body = await asyncio.wait_for(actor.saves_beside.ask(beside()), 10)
    row = await house.outcomes.saved_beside(actor.run, beside(), body)
    assert (row.step, row.sampler_id, row.name) == (1, "sampler1", ".sampler1")
    assert json.loads(((await house.store.folder(row.id)) / "state.json").read_text())["step"] == 1
    async with house.db.read() as session:
        assert await queries_checkpoints.get(session, "saved01") is not None
        assert await queries_checkpoints.matching(session, "team", run_id=RUN_ID) == []
    await house.submit(loss(5), 3, "c")
    assert (await step_result(house, "d")).metrics["step"] == 2


async def test_a_worker_that_dies_is_reported_and_the_next_one_saves(house: FakeHouse):
    actor = await house.scheduler.actor(RUN_ID)
    await house.submit(loss(3), 1, "a")
    await house.submit(STEP, 2, "b")
    weights = (await step_result(house, "b")).metrics["weights"]
    worker = house.lifecycle.workers[-1]
    worker.dies_at = len(worker.executed)
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(actor.saves_beside.ask(beside()), 10)
    body = await asyncio.wait_for(actor.saves_beside.ask(beside()), 10)
    row = await house.outcomes.saved_beside(actor.run, beside(), body)
    stored = json.loads(((await house.store.folder(row.id)) / "state.json").read_text())
    assert (stored["weights"], stored["step"]) == (weights, 1)


async def test_nobody_waits_for_a_run_that_ends(house: FakeHouse):
    run = await house.run()
    actor = await house.scheduler.actor(run.id)
    await house.submit(loss(3), 1, "a")
    await actor.halt()
    asked = asyncio.create_task(actor.saves_beside.ask(beside()))
    await asyncio.sleep(0)
    await house.scheduler.end(run.id)
    with pytest.raises(OperationFailed, match="the run ended"):
        await asyncio.wait_for(asked, 10)
    with pytest.raises(OperationFailed, match="the run ended"):
        await actor.saves_beside.ask(beside())
