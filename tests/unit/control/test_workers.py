"""A worker's place counts the deaths of what it started."""

import asyncio
from pathlib import Path

import pytest

from fake_launcher import FakeLauncher
from selfloop.control.capacity.workers import WorkerSlot
from selfloop.types.blob_ref import DATA, BlobRef
from selfloop.types.errors import OperationFailed, WorkerLost, model_invalid
from selfloop.worker.launchers.base import WorkerSpec


def slot_on(launcher: FakeLauncher, states: list[str] | None = None) -> WorkerSlot:
    async def prepare(_name: str, _note: object) -> Path:
        return Path()

    async def on_state(_name: str, state: str, _reason: str) -> None:
        if states is not None:
            states.append(state)

    return WorkerSlot("tiny", prepare, lambda name, _folder: WorkerSpec(name, BlobRef(DATA, "m")), launcher, on_state)


async def test_whoever_asks_soon_after_hears_the_same_kind_of_failure() -> None:
    launcher = FakeLauncher(fails=model_invalid("hidden_act 'gelu' is not supported"))
    slot = slot_on(launcher)
    for _ in range(2):
        with pytest.raises(OperationFailed, match="gelu") as failed:
            await slot.acquire()
        assert failed.value.error_class == "ModelInvalid"
    assert len(launcher.specs) == 1, "not tried again so soon"


@pytest.mark.parametrize(
    ("fails", "cause", "num_launches"),
    [
        (WorkerLost("worker process exited with status 1"), "died 3 times while loading: worker process exited", 3),
        (OperationFailed("the folder holds no weights", "LoadFailed"), "holds no weights", 1),
    ],
)
async def test_what_cannot_be_loaded_fails_with_its_cause(fails: Exception, cause: str, num_launches: int) -> None:
    launcher = FakeLauncher(fails=fails)
    slot = slot_on(launcher)
    with pytest.raises(OperationFailed, match=cause):
        await slot.acquire()
    assert slot.state == "failed"
    assert cause in slot.reason
    assert len(launcher.specs) == num_launches


async def test_who_waits_for_a_load_can_be_cancelled() -> None:
    waiting = asyncio.create_task(slot_on(FakeLauncher(hangs=True)).acquire())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_third_death_within_a_minute_is_a_crash_loop() -> None:
    states: list[str] = []
    launcher = FakeLauncher()
    slot = slot_on(launcher, states)
    for _ in range(3):
        client = await slot.acquire()
        assert slot.state == "ready"
        await launcher.handles[-1].kill("killed")
        assert await client.lost == "killed"
        while slot.client is not None:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
    assert slot.state == "crashing"
    assert "3 times" in slot.reason
    states.clear()
    await slot.acquire()
    assert states == ["ready"], "it stays unhealthy until it is loaded again"
    await slot.stop("done")
    assert launcher.released == ["tiny"]
