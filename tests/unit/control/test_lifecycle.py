"""Statuses: each transition with its cause, scale to zero by a fake clock, waking."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from fake_capacity import CapacityHouse
from selfloop.control.capacity.lifecycle import record_creation
from selfloop.storage.db import queries_observations, queries_resources
from selfloop.types.errors import OperationFailed


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[CapacityHouse]:
    house = CapacityHouse(tmp_path)
    yield house
    await house.lifecycle.stop()
    await house.db.close()


async def test_capacity_comes_up_with_its_worker(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    assert house.lifecycle.status("dep") == "RUNNING"
    assert house.lifecycle.status("sam") == "ACTIVE"


async def test_every_transition_is_recorded_with_its_cause(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    async with house.db.read() as session:
        change = await queries_resources.last_change(session, "sam")
    assert change is not None
    assert (change.status, change.reason) == ("ACTIVE", "ready")


async def test_a_model_that_cannot_load_shows_its_cause(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    house.slot("tiny").failure = OperationFailed("no weights in the folder")
    with pytest.raises(OperationFailed, match="no weights"):
        await house.lifecycle.wake("dep")
    assert house.lifecycle.status("dep") == "FAILED"
    assert house.lifecycle.status("sam") == "DEPLOY_FAILED"
    assert house.lifecycle.describe("dep") == "no weights in the folder"


async def test_idle_capacity_sleeps_and_its_worker_ends(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.pass_time(9.0)
    assert house.lifecycle.status("dep") == "RUNNING"
    await house.pass_time(2.0)
    assert house.suspended == ["dep"]
    assert house.lifecycle.status("dep") == "SCALED_TO_ZERO"
    assert house.lifecycle.status("sam") == "SCALED_TO_ZERO"
    assert house.slot("tiny").state == "stopped"


async def test_use_and_touch_keep_it_awake(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    with house.lifecycle.using("sam"):
        await house.pass_time(100.0)
        assert house.lifecycle.status("dep") == "RUNNING"
    await house.pass_time(9.0)
    house.lifecycle.touch("sam")
    await house.pass_time(9.0)
    assert house.lifecycle.status("dep") == "RUNNING"


async def test_a_worker_lives_while_any_capacity_on_it_does(house: CapacityHouse) -> None:
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


async def test_waking_brings_trainer_and_sampler_back(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.pass_time(11.0)
    await house.lifecycle.wake("sam")
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("RUNNING", "ACTIVE")
    assert house.slot("tiny").states.count("ready") == 2


async def test_readiness_is_waited_for(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    waiting = asyncio.create_task(house.lifecycle.wait_until_stable("sam", 10.0))
    await asyncio.sleep(0)
    await house.lifecycle.wake("dep")
    await asyncio.wait_for(waiting, 1.0)
    assert house.lifecycle.status("sam") == "ACTIVE"


async def test_what_ended_is_no_longer_capacity(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.lifecycle.end("sam", "deactivated")
    assert house.lifecycle.status("sam") is None
    async with house.db.read() as session:
        change = await queries_resources.last_change(session, "sam")
    assert change is not None
    assert (change.status, change.reason) == ("INACTIVE", "deactivated")


async def test_a_worker_that_dies_is_started_again_while_somebody_is_awake(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    slot = house.slot("tiny")
    await slot.enter("restarting", "killed")
    await asyncio.wait_for(_until(lambda: slot.states.count("ready") == 2), 10.0)
    await asyncio.wait_for(_until(lambda: house.lifecycle.status("sam") == "ACTIVE"), 10.0)
    assert house.lifecycle.status("dep") == "RUNNING"


async def test_a_worker_that_dies_again_and_again_is_unhealthy_until_it_is_used(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    slot = house.slot("tiny")
    await slot.enter("crashing", "it died 3 times within 60 s")
    await asyncio.sleep(0)
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("FAILED", "UNHEALTHY")
    assert house.lifecycle.describe("sam") == "it died 3 times within 60 s"
    assert slot.state == "crashing", "nobody starts it again by itself"
    await house.lifecycle.wake("sam")
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("RUNNING", "ACTIVE")


async def test_what_has_served_and_cannot_be_loaded_any_more_has_failed(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    await house.pass_time(11.0)
    house.slot("tiny").failure = OperationFailed("the folder is gone")
    with pytest.raises(OperationFailed):
        await house.lifecycle.wake("sam")
    assert (house.lifecycle.status("dep"), house.lifecycle.status("sam")) == ("FAILED", "FAILED")


async def test_a_sampler_finishes_its_samples_before_it_ends(house: CapacityHouse) -> None:
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


async def test_what_ends_is_not_put_to_sleep(house: CapacityHouse) -> None:
    house.add_run("dep", "sam")
    await house.lifecycle.wake("dep")
    with house.lifecycle.using("sam"):
        ending = asyncio.create_task(house.lifecycle.end("sam", "deactivated"))
        await asyncio.wait_for(_until(lambda: house.lifecycle.status("sam") == "DEACTIVATING"), 10.0)
    await house.pass_time(11.0)
    await ending
    async with house.db.read() as session:
        changes = [c.status for c in await queries_observations.status_changes(session, {"sam"})]
    assert "SCALED_TO_ZERO" not in changes
    assert changes[-1] == "INACTIVE"


async def test_a_change_that_the_table_lacks_is_refused(house: CapacityHouse) -> None:
    with pytest.raises(AssertionError, match="a sampler does not go from None to ACTIVE by creation"):
        async with house.db.write() as session:
            record_creation(session, "sampler", "sam", "ACTIVE", "made")


async def test_what_stands_never_sleeps(house: CapacityHouse) -> None:
    house.lifecycle.add("sampler", "sam", "sam", "tiny", math.inf, "BUILDING")
    await house.lifecycle.wake("sam")
    await house.pass_time(1e9)
    assert house.lifecycle.status("sam") == "ACTIVE"
    assert house.slot("tiny").state == "ready"


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what changes is under test, and notifies nobody
        await asyncio.sleep(0)
