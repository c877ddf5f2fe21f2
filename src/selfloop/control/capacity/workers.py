"""The workers of a base model, one a group: started when needed, watched, brought back, stopped when idle."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.types.settings import ControlSettings, WorkerSettings
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.launchers.base import Launcher, WorkerSpec

log = logging.getLogger(__name__)

WorkerState = Literal["stopped", "preparing", "loading", "ready", "restarting", "crashing", "failed"]

# A model that could not be loaded is not tried again before this, so that a queue of waiters fails fast.
_RETRY_FAILED_S = 10.0
# Deaths in a row before a worker counts as unable to start.
_MAX_STARTS = 3
# A loaded worker that died this often within this time is crashing over and over.
_MAX_CRASHES = 3
_CRASH_WINDOW_S = 60.0


class WorkerSlot:
    """The place of one worker group of a base model; ``acquire`` gives a loaded worker.

    Args:
        spec: what to launch, by the group's name and the model's folder.
        on_state: hears every change, with the group's name.
        index: among the groups of the model, from 0.
    """

    def __init__(
        self,
        model_name: str,
        prepare: Callable[[str, Callable[[str], None]], Awaitable[Path]],
        spec: Callable[[str, Path], WorkerSpec],
        launcher: Launcher,
        on_state: Callable[[str, WorkerState, str], Awaitable[None]],
        index: int = 0,
    ) -> None:
        self.model_name = model_name
        self.name = group_name(model_name, index)
        self.state: WorkerState = "stopped"
        self.reason = ""
        self._prepare = prepare
        self._spec = spec
        self._launcher = launcher
        self._on_state = on_state
        self._client: WorkerClient | None = None
        self._lock = asyncio.Lock()
        self._failed_at = float("-inf")
        self._failure = "LoadFailed"
        self._crashed_at: list[float] = []
        self._watch: asyncio.Task[None] | None = None

    @property
    def client(self) -> WorkerClient | None:
        """The loaded worker, if there is one now."""
        return self._client if self.state == "ready" else None

    @property
    def is_down(self) -> bool:
        """Its worker died, or could not be started, and was not started again."""
        if self.state in ("restarting", "crashing", "failed"):
            return not self._lock.locked()  # Else somebody is starting it.
        return self._client is not None and self._client.lost.done()

    async def acquire(self) -> WorkerClient:
        """A worker with the base model in memory; starts one if need be.

        Raises:
            OperationFailed: the model cannot be prepared or loaded, with the cause.
        """
        async with self._lock:
            if self._client is not None:
                if not self._client.lost.done():
                    return self._client
                await self._crashed(self._client.lost.result())
            if self.state == "failed" and time.monotonic() - self._failed_at < _RETRY_FAILED_S:
                raise OperationFailed(self.reason, self._failure)
            try:
                return await self._start()
            except OperationFailed as error:
                self._failed_at, self._failure = time.monotonic(), error.error_class
                await self._set("failed", str(error))
                raise

    async def _start(self) -> WorkerClient:
        self._client = None
        if self.state not in ("restarting", "crashing"):
            await self._set("preparing", "preparing the model's files")
        folder = await self._prepare(self.model_name, self._note)
        lost = ""
        for attempt in range(1, _MAX_STARTS + 1):
            if self.state != "crashing":
                await self._set("loading", "starting the worker process")
            try:
                client = await self._launched(folder)
            except WorkerLost as error:
                lost = str(error)
                log.warning("worker of %s died while loading (%d): %s", self.name, attempt, lost)
                continue
            info = client.ready.result()
            log.info("worker of %s is ready (%s): %s", self.name, client.address, info)
            self._client = client
            await self._set("ready", f"serving on {info.device} in {info.dtype}")
            self._watch = asyncio.create_task(self._watch_client(client), name=f"watch-{self.name}")
            return client
        raise OperationFailed(f"the worker died {_MAX_STARTS} times while loading: {lost}", "LoadFailed")

    async def _launched(self, folder: Path) -> WorkerClient:
        """A worker that has its model. Raises :class:`WorkerLost` and :class:`OperationFailed`."""
        handle = await self._launcher.launch(self._spec(self.name, folder), self._note)
        client = WorkerClient(handle, self._note)
        try:
            await client.ready
        except BaseException as error:
            await client.kill(str(error))
            raise
        return client

    async def _watch_client(self, client: WorkerClient) -> None:
        reason = await asyncio.shield(client.lost)
        await client.kill(reason)
        if self._client is client:
            await self._crashed(reason)

    async def _crashed(self, reason: str) -> None:
        """The loaded worker is gone, seen by whoever looks first."""
        self._client = None
        log.warning("worker of %s is lost: %s", self.name, reason)
        now = time.monotonic()
        self._crashed_at = [at for at in self._crashed_at if now - at < _CRASH_WINDOW_S] + [now]
        if len(self._crashed_at) < _MAX_CRASHES:
            await self._set("restarting", reason)
        else:
            died = f"the worker died {len(self._crashed_at)} times within {_CRASH_WINDOW_S:.0f} s"
            await self._set("crashing", f"{died}: {reason}; it is started again on use")

    async def stop(self, reason: str, is_needed: Callable[[], bool] = lambda: False) -> None:
        """End the process and give its memory back; not if it is needed again by the time that its load is over."""
        async with self._lock:
            if is_needed():
                return
            client, self._client = self._client, None
            await self._set("stopped", reason)
            if self._watch is not None:
                self._watch.cancel()
                await asyncio.gather(self._watch, return_exceptions=True)
                self._watch = None
            try:
                if client is not None:
                    await client.stop()
            finally:
                self.release()

    def release(self) -> None:
        """Give back the memory of the base model, and of a worker that there may be, now."""
        self._launcher.release(self.name)

    def _note(self, stage: str) -> None:
        self.reason = stage

    async def _set(self, state: WorkerState, reason: str) -> None:
        self.state, self.reason = state, reason
        await self._on_state(self.name, state, reason)


class WorkerPool:
    """The slots of every base model, made on first use.

    Args:
        make_slot: of a base model and the index of a group.
        num_groups: of each base model.
    """

    def __init__(self, make_slot: Callable[[str, int], WorkerSlot], num_groups: int = 1) -> None:
        self._make_slot = make_slot
        self._num_groups = num_groups
        self._slots: dict[str, list[WorkerSlot]] = {}

    def slots_of(self, model_name: str) -> list[WorkerSlot]:
        """Those of a base model, in order."""
        if model_name not in self._slots:
            self._slots[model_name] = [self._make_slot(model_name, index) for index in range(self._num_groups)]
        return self._slots[model_name]

    def client(self, model_name: str) -> WorkerClient | None:
        """A loaded worker of a base model, if there is one now."""
        return next((slot.client for slot in self.slots_of(model_name) if slot.client is not None), None)

    def slots(self) -> list[WorkerSlot]:
        """Those of the base models that were used since the start."""
        return [slot for slots in self._slots.values() for slot in slots]

    async def stop(self) -> None:
        try:
            await asyncio.gather(*(slot.stop("the server is stopping") for slot in self.slots()))
        finally:
            # Also where one was still loading.
            for slot in self.slots():
                slot.release()


def group_name(model_name: str, index: int) -> str:
    """Of a worker group; the first is called as its base model is."""
    return model_name if index == 0 else f"{model_name}#{index}"


def share_of(settings: ControlSettings) -> WorkerSettings:
    """What each worker group is started with: of a base model's groups each has as many cores, and as much memory."""
    worker, num_groups = settings.worker, settings.num_workers
    if num_groups == 1:
        return worker
    cores = worker.engine.num_threads or max(1, len(os.sched_getaffinity(0)) // num_groups)
    limits = replace(worker.engine.limits, memory_parts=num_groups)
    return replace(worker, engine=replace(worker.engine, num_threads=cores, limits=limits))
