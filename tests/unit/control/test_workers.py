"""A worker's place counts the deaths of what it started."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from selfloop.control.capacity import workers
from selfloop.control.capacity.workers import WorkerSlot
from selfloop.types.errors import OperationFailed, WorkerLost, model_invalid
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.launchers.local import WorkerCommand
from selfloop.worker.protocol import ModelInfo


class Host:
    def serves(self, _command: object) -> bool:
        return True

    async def ready(self) -> None: ...

    def end(self) -> None: ...


class DyingClient:
    """A client whose process is up at once and dies when told."""

    made: "list[DyingClient]"

    def __init__(self, _command: object, _note: object) -> None:
        loop = asyncio.get_running_loop()
        self.pid = 1
        self.lost: asyncio.Future[str] = loop.create_future()
        self.ready: asyncio.Future[ModelInfo] = loop.create_future()
        self.ready.set_result(ModelInfo(1, 1, 1, "float32", "cpu"))
        DyingClient.made.append(self)

    async def start(self, _host: object) -> None: ...

    async def kill(self, reason: str) -> None: ...

    async def stop(self) -> None: ...


class LostHost(Host):
    """A process that ends while it loads."""

    async def ready(self) -> None:
        raise WorkerLost("worker process exited with status 1")


class RefusingHost(Host):
    """One that cannot load the model."""

    async def ready(self) -> None:
        raise OperationFailed("the folder holds no weights", "LoadFailed")


class StuckHost(Host):
    async def ready(self) -> None:
        await asyncio.Event().wait()


async def launch(_command: object) -> Host:
    return Host()


def slot_on(host: Host, monkeypatch: pytest.MonkeyPatch) -> WorkerSlot:
    async def launched(_command: object) -> Host:
        return host

    async def prepare(_name: str, _note: object) -> Path:
        return Path()

    async def on_state(_name: str, _state: str, _reason: str) -> None: ...

    monkeypatch.setattr(workers, "find_or_launch", launched)
    return WorkerSlot("tiny", prepare, lambda _name, _folder: cast(WorkerCommand, None), on_state)


class UnloadableHost(Host):
    """One whose model can never be loaded."""

    async def ready(self) -> None:
        raise model_invalid("hidden_act 'gelu' is not supported")


async def test_whoever_asks_soon_after_hears_the_same_kind_of_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = slot_on(UnloadableHost(), monkeypatch)
    for _ in range(2):
        with pytest.raises(OperationFailed, match="gelu") as failed:
            await slot.acquire()
        assert failed.value.error_class == "ModelInvalid"


@pytest.mark.parametrize(
    ("host", "cause"),
    [(LostHost(), "died 3 times while loading: worker process exited"), (RefusingHost(), "holds no weights")],
)
async def test_what_cannot_be_loaded_fails_with_its_cause(
    host: Host, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_on(host, monkeypatch)
    with pytest.raises(OperationFailed, match=cause):
        await slot.acquire()
    assert slot.state == "failed"
    assert cause in slot.reason


async def test_who_waits_for_a_load_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = asyncio.create_task(slot_on(StuckHost(), monkeypatch).acquire())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_third_death_within_a_minute_is_a_crash_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    DyingClient.made = []
    monkeypatch.setattr(workers, "WorkerClient", cast(type[WorkerClient], DyingClient))
    monkeypatch.setattr(workers, "find_or_launch", launch)
    states: list[str] = []

    async def prepare(_name: str, _note: object) -> Path:
        return Path()

    async def on_state(_name: str, state: str, _reason: str) -> None:
        states.append(state)

    slot = WorkerSlot("tiny", prepare, lambda _name, _folder: cast(WorkerCommand, None), on_state)
    for _ in range(3):
        await slot.acquire()
        assert slot.state == "ready"
        DyingClient.made[-1].lost.set_result("killed")
        await slot._crashed("killed") if slot._client is not None else None
    assert slot.state == "crashing"
    assert "3 times" in slot.reason
    states.clear()
    await slot.acquire()
    assert states == ["ready"], "it stays unhealthy until it is loaded again"
    await slot.stop("done")
