"""Capacity on a temporary folder: a worker's place without a process, and a clock that is set."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from fake_worker import FakeWorker
from selfloop.control.capacity.lifecycle import Lifecycle
from selfloop.control.capacity.workers import WorkerPool, WorkerState
from selfloop.storage.db.database import Database
from selfloop.types.errors import OperationFailed
from stores import database_url


class FakeSlot:
    """A worker's place without a process: ``acquire`` walks through the states of a start."""

    def __init__(self, model_name: str, lifecycle: Lifecycle) -> None:
        self.model_name = self.name = model_name
        self.lifecycle = lifecycle
        self.state: WorkerState = "stopped"
        self.reason = ""
        self.failure: OperationFailed | None = None
        self.states: list[str] = []

    async def acquire(self) -> FakeWorker:
        if self.state == "ready":
            return FakeWorker({})
        for state in ("preparing", "loading", "failed" if self.failure else "ready"):
            await self.enter(cast(WorkerState, state), str(self.failure or state))
        if self.failure:
            raise self.failure
        return FakeWorker({})

    async def stop(self, reason: str, is_needed: Callable[[], bool]) -> None:
        assert not is_needed()
        await self.enter("stopped", reason)

    async def enter(self, state: WorkerState, reason: str) -> None:
        self.state, self.reason = state, reason
        self.states.append(state)
        await self.lifecycle.on_worker_state(self.model_name, state, reason)


class CapacityHouse:
    def __init__(self, folder: Path) -> None:
        self.db = Database(database_url(folder))
        self.now = 1000.0
        self.suspended: list[str] = []
        self.slots: dict[str, FakeSlot] = {}
        self.lifecycle = Lifecycle(self.db, cast(WorkerPool, self), self._suspend, clock=lambda: self.now)

    def slot(self, model_name: str) -> FakeSlot:
        return self.slots.setdefault(model_name, FakeSlot(model_name, self.lifecycle))

    def slots_of(self, model_name: str) -> list[FakeSlot]:
        return [self.slot(model_name)]

    async def _suspend(self, deployment_id: str) -> None:
        self.suspended.append(deployment_id)

    def add_run(self, deployment: str, sampler: str, delay_s: float = 10.0) -> None:
        self.lifecycle.add("deployment", deployment, deployment, "tiny", delay_s, "CREATED")
        self.lifecycle.add("sampler", sampler, deployment, "tiny", delay_s, "BUILDING")

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        await self.lifecycle.reap()
