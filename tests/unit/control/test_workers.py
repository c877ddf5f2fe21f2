"""A worker's place counts the deaths of what it started."""

from pathlib import Path
from typing import cast

import pytest

from selfloop.control import workers
from selfloop.control.workers import WorkerSlot
from selfloop.worker.client import WorkerClient
from selfloop.worker.launch_local import WorkerCommand
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
        import asyncio

        loop = asyncio.get_running_loop()
        self.pid = 1
        self.lost: asyncio.Future[str] = loop.create_future()
        self.ready: asyncio.Future[ModelInfo] = loop.create_future()
        self.ready.set_result(ModelInfo(1, 1, 1, "float32", "cpu"))
        DyingClient.made.append(self)

    async def start(self, _host: object) -> None: ...

    async def kill(self, reason: str) -> None: ...

    async def stop(self) -> None: ...


async def launch(_command: object) -> Host:
    return Host()


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
