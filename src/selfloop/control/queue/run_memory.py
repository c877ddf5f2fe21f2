"""Which runs lie in a worker at a time: those that fit its memory. The longest unused makes room for the next.

A run that is open takes its adapter, its accumulated gradient, two moments and a published copy. Beside them a snapshot
copies one run's state and a step scales one run's gradient. The worker says how much all of that may take, when it has
loaded its model.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import msgspec

from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import parameters_per_rank
from selfloop.worker.client.worker_client import WorkerClient

log = logging.getLogger(__name__)

_FLOAT_BYTES = 4
# Weights, gradient, two moments, a published copy; and what one run at a time takes besides: a snapshot's copy of the
# first four, and a scaled gradient.
_OPEN_COPIES, _MORE_COPIES = 5, 5
# How long a run that has work keeps its place before others that wait have theirs.
_TURN_S = 5.0
_LOOK_EVERY_S = 0.1
# What is left of the plan after the kernel has ended a worker for want of memory.
_SHRINK = 0.8


class Held(Protocol):
    """A run that is open, as :class:`RunMemory` sees it."""

    @property
    def is_busy(self) -> bool: ...

    async def suspend(self) -> None: ...


@dataclass(slots=True)
class _Open:
    run: Held
    worker: WorkerClient
    num_bytes: int
    since: float
    used_at: float


@dataclass(slots=True)
class RunMemory:
    """The runs of one base model. Runs that wait for a worker have their turn in the order they came."""

    model_name: str
    clock: Callable[[], float] = time.monotonic
    _share: float = 1.0
    _open: dict[str, _Open] = field(default_factory=dict[str, _Open])
    _turns: "WeakKeyDictionary[WorkerClient, asyncio.Lock]" = field(
        default_factory=WeakKeyDictionary[WorkerClient, asyncio.Lock]
    )
    _ended_by_kernel: WorkerClient | None = None
    _limit: int | None = None

    def num_open(self, worker: WorkerClient) -> int:
        return sum(entry.worker is worker for entry in self._open.values())

    @property
    def limit_bytes(self) -> int | None:
        """What open runs may take in all; None before a worker has said it."""
        return self._limit

    def planned(self, worker_bytes: int) -> int:
        self._limit = int(worker_bytes * self._share)
        return self._limit

    async def enter(
        self, run_id: str, run: Held, worker: WorkerClient, num_bytes: int, waits: Callable[[str], None]
    ) -> None:
        """Have room for a run in ``worker``, once there is; ``waits`` hears for what.

        Raises:
            OperationFailed: it does not fit even alone.
        """
        self._open.pop(run_id, None)
        async with self._turns.setdefault(worker, asyncio.Lock()):
            limit = self.planned((await worker.ready).run_bytes)
            if needed([num_bytes]) > limit:
                raise OperationFailed(
                    f"the run takes {needed([num_bytes]):,} bytes, and {limit:,} are planned for runs (--memory)",
                    "MemoryExceeded",
                )
            started = self.clock()
            while not worker.lost.done() and needed([num_bytes, *self._sizes(worker)]) > limit:
                others = [entry for entry in self._open.values() if entry.worker is worker]
                waits(f"waiting for memory: {len(others)} runs are open, and their {limit:,} bytes have no room for it")
                now = self.clock()
                idle = [entry for entry in others if not entry.run.is_busy]
                if not idle and now - started >= _TURN_S:
                    idle = [entry for entry in others if now - entry.since >= _TURN_S]
                if idle:
                    await min(idle, key=lambda entry: entry.used_at).run.suspend()
                else:
                    await asyncio.sleep(_LOOK_EVERY_S)
            now = self.clock()
            self._open[run_id] = _Open(run, worker, num_bytes, now, now)
            waits("")

    def _sizes(self, worker: WorkerClient) -> list[int]:
        return [entry.num_bytes for entry in self._open.values() if entry.worker is worker]

    def used(self, run_id: str) -> None:
        entry = self._open.get(run_id)
        if entry is not None:
            entry.used_at = self.clock()

    def leave(self, run_id: str) -> None:
        self._open.pop(run_id, None)

    def ended_by_kernel(self, worker: WorkerClient) -> None:
        """The kernel ended a worker for want of memory: what was planned was too much."""
        if self._ended_by_kernel is not worker:
            self._ended_by_kernel = worker
            self._share *= _SHRINK
            log.warning(
                "%s: the kernel ended the worker for want of memory; runs may take %.0f%% of what was planned",
                self.model_name,
                100 * self._share,
            )


def bytes_open(num_parameters: int) -> int:
    """What a run of so many trained numbers takes while it is open."""
    return _OPEN_COPIES * _FLOAT_BYTES * num_parameters


def needed(open_bytes: list[int]) -> int:
    """Of runs that take so much each while they are open."""
    return sum(open_bytes) + max(open_bytes, default=0) * _MORE_COPIES // _OPEN_COPIES


class RunMemories:
    """The memory of every base model's workers."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._of: dict[str, RunMemory] = {}

    def of(self, model_name: str) -> RunMemory:
        return self._of.setdefault(model_name, RunMemory(model_name))

    async def open_bytes(self, run: RunRow) -> int:
        """What the run takes while it is open; 0 when its model's folder is gone, which its worker has in memory."""
        folder = await self._catalogue.stored_folder(run.model_name)
        if folder is None:
            return 0
        return max(run.lora_rank, run.initial_rank) * await _bytes_per_rank(folder, LoraTargets.parse(run.targets))

    async def check_rank(self, model_name: str, rank: int, targets: LoraTargets) -> None:
        """Raises :class:`BadRequest` with the largest rank that fits, once the model's worker has said what does."""
        limit, folder = self.of(model_name).limit_bytes, await self._catalogue.stored_folder(model_name)
        if limit is None or folder is None:
            return
        each = await _bytes_per_rank(folder, targets)
        if each and needed([rank * each]) > limit:
            largest = limit // needed([each])
            raise BadRequest("lora_rank", f"at most {largest}, which fits the memory for runs (--memory), got {rank}")


async def _bytes_per_rank(folder: Path, targets: LoraTargets) -> int:
    def read() -> int:
        try:
            return bytes_open(parameters_per_rank(folder, targets))
        except (OSError, msgspec.MsgspecError):
            return 0

    return await asyncio.to_thread(read)
