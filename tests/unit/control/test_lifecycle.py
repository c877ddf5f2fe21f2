"""Statuses: each transition with its cause, scale to zero by a fake clock, waking."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import cast

import pytest

from fake_worker import FakeWorker
from selfloop.control.capacity.lifecycle import Lifecycle
from selfloop.control.capacity.workers import WorkerPool, WorkerState
from selfloop.storage.db import queries_resources
from selfloop.storage.db.database import Database
from selfloop.types.errors import OperationFailed
from stores import database_url


class FakeSlot:
    """A worker's place without a process: ``acquire`` walks through the states of a start."""

    def __init__(self, model_name: str, lifecycle: Lifecycle) -> None:
        self.model_name, self.lifecycle = model_name, lifecycle
        self.state: WorkerState = "stopped"
        self.reason = ""
        self.failure: OperationFailed | None = None
        self.states: list[str] = []

    async def acquire(self) -> FakeWorker:
        if self.state == "ready":
            return FakeWorker({})
        for state in ("preparing", "loading", "failed" if self.failure else "ready"):
            await self._set(cast(WorkerState, state), str(self.failure or state))
        if self.failure:
            raise self.failure
        return FakeWorker({})

    async def stop(self, reason: str, is_needed: Callable[[], bool]) -> None:
        assert not is_needed()
        await self._set("stopped", reason)

    async def _set(self, state: WorkerState, reason: str) -> None:
        self.state, self.reason = state, reason
        self.states.append(state)
        await self.lifecycle.on_worker_state(self.model_name, state, reason)


class House:
    def __init__(self, folder: Path) -> None:
        self.db = Database(database_url(folder))
        self.now = 1000.0
        self.parked: list[str] = []
        self.slots: dict[str, FakeSlot] = {}
        self.lifecycle = Lifecycle(self.db, cast(WorkerPool, self), self._suspend, clock=lambda: self.now)

    def slot(self, model_name: str) -> FakeSlot:
        return self.slots.setdefault(model_name, FakeSlot(model_name, self.lifecycle))

    async def _suspend(self, deployment_id: str) -> None:
        self.parked.append(deployment_id)

    def add_run(self, deployment: str, sampler: str, delay_s: float = 10.0) -> None:
        self.lifecycle.add("deployment", deployment, deployment, "tiny", delay_s, "CREATED")
        self.lifecycle.add("sampler", sampler, deployment, "tiny", delay_s, "BUILDING")

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        await self.lifecycle.reap()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[House]:
    house = House(tmp_path)
    yield house
    await house.lifecycle.stop()
    await house.db.close()


async def test_capacity_comes_up_with_its_worker(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    assert house.lifecycle.status("dep") == "RUNNING"
    assert house.lifecycle.status("sam") == "ACTIVE"


async def test_every_transition_is_recorded_with_its_cause(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    async with house.db.read() as session:
        change = await queries_resources.last_change(session, "sam")
    assert change is not None
    assert (change.status, change.reason) == ("ACTIVE", "ready")


async def test_a_model_that_cannot_load_shows_its_cause(house: House) -> None:
    house.add_run("dep", "sam")
    house.slot("tiny").failure = OperationFailed("no weights in the folder")
    with pytest.raises(OperationFailed, match="no weights"):
        await house.lifecycle.wake("dep")
    assert house.lifecycle.status("dep") == "FAILED"
    assert house.lifecycle.status("sam") == "DEPLOY_FAILED"
    assert house.lifecycle.describe("dep") == "no weights in the folder"


async def test_idle_capacity_sleeps_and_its_worker_ends(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.pass_time(9.0)
    assert house.lifecycle.status("dep") == "RUNNING"
    await house.pass_time(2.0)
    assert house.parked == ["dep"]
    assert house.lifecycle.status("dep") == "SCALED_TO_ZERO"
    assert house.lifecycle.status("sam") == "SCALED_TO_ZERO"
    assert house.slot("tiny").state == "stopped"


async def test_use_and_touch_keep_it_awake(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    with house.lifecycle.using("sam"):
        await house.pass_time(100.0)
        assert house.lifecycle.status("dep") == "RUNNING"
    await house.pass_time(9.0)
    house.lifecycle.touch("sam")
    await house.pass_time(9.0)
    assert house.lifecycle.status("dep") == "RUNNING"


async def test_a_worker_lives_while_any_capacity_on_it_does(house: House) -> None:
    house.add_run("dep", "sam", delay_s=10.0)
    house.add_run("dep2", "sam2", delay_s=50.0)
    await house.lifecycle.wake("dep")
    await house.lifecycle.wake("dep2")
    await house.pass_time(11.0)
    assert (house.lifecycle.status("dep"), house.lifecycle.status("dep2")) == ("SCALED_TO_ZERO", "RUNNING")
    assert house.slot("tiny").state == "ready"
    await house.lifecycle.end("sam2", "done")
    await house.lifecycle.end("dep2", "done")
    assert house.slot("tiny").state == "stopped"


async def test_waking_brings_trainer_and_sampler_back(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.pass_time(11.0)
    await house.lifecycle.wake("sam")
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("RUNNING", "ACTIVE")
    assert house.slot("tiny").states.count("ready") == 2


async def test_readiness_is_waited_for(house: House) -> None:
    house.add_run("dep", "sam")
    waiting = asyncio.create_task(house.lifecycle.wait_until_stable("sam", 10.0))
    await asyncio.sleep(0)
    await house.lifecycle.wake("dep")
    await asyncio.wait_for(waiting, 1.0)
    assert house.lifecycle.status("sam") == "ACTIVE"


async def test_what_ended_is_no_longer_capacity(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.lifecycle.end("sam", "deactivated")
    assert house.lifecycle.status("sam") is None
    async with house.db.read() as session:
        change = await queries_resources.last_change(session, "sam")
    assert change is not None
    assert (change.status, change.reason) == ("INACTIVE", "deactivated")


async def test_a_worker_that_dies_is_started_again_while_somebody_is_awake(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    slot = house.slot("tiny")
    await slot._set("restarting", "killed")
    await asyncio.wait_for(_until(lambda: slot.states.count("ready") == 2), 10.0)
    await asyncio.wait_for(_until(lambda: house.lifecycle.status("sam") == "ACTIVE"), 10.0)
    assert house.lifecycle.status("dep") == "RUNNING"


async def test_a_worker_that_dies_again_and_again_is_unhealthy_until_it_is_used(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    slot = house.slot("tiny")
    await slot._set("crashing", "it died 3 times within 60 s")
    await asyncio.sleep(0)
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("FAILED", "UNHEALTHY")
    assert house.lifecycle.describe("sam") == "it died 3 times within 60 s"
    assert slot.state == "crashing", "nobody starts it again by itself"
    await house.lifecycle.wake("sam")
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("RUNNING", "ACTIVE")


async def test_what_has_served_and_cannot_be_loaded_any_more_has_failed(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.pass_time(11.0)
    house.slot("tiny").failure = OperationFailed("the folder is gone")
    with pytest.raises(OperationFailed):
        await house.lifecycle.wake("sam")
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("FAILED", "FAILED")


async def test_a_sampler_finishes_its_samples_before_it_ends(house: House) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    with house.lifecycle.using("sam"):
        ending = asyncio.create_task(house.lifecycle.end("sam", "deactivated"))
        await asyncio.wait_for(_until(lambda: house.lifecycle.status("sam") == "DEACTIVATING"), 10.0)
        await house.lifecycle.on_worker_state("tiny", "ready", "serving")
        assert house.lifecycle.status("sam") == "DEACTIVATING"
        assert "1 requests" in house.lifecycle.describe("sam")
        assert not ending.done()
    await ending
    assert house.lifecycle.status("sam") is None
    assert house.lifecycle.status("dep") == "RUNNING"


async def test_what_stands_never_sleeps(house: House) -> None:
    house.lifecycle.add("sampler", "sam", "sam", "tiny", math.inf, "BUILDING")
    await house.lifecycle.wake("sam")
    await house.pass_time(1e9)
    assert house.lifecycle.status("sam") == "ACTIVE"
    assert house.slot("tiny").state == "ready"


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what changes is under test, and tells nobody
        await asyncio.sleep(0)
