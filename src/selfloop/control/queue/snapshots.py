"""When a run's state is stored: beside its work, and never ahead of what is completed.

Two stored states are kept, so that a damaged one is not the end: the newest, and the one before it (at first, the run's
start) with the payloads of all operations after it. A load of a checkpoint, which is never done again, is stored twice.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from selfloop.control.queue.journal import Journal
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.stored_states import Position, StoredState, newest_state
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import OperationFailed, WorkerLost, disk_full
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import Snapshot, Written

log = logging.getLogger(__name__)

# A snapshot that costs a second comes after at least fifty seconds of work.
MAX_SHARE = 0.02
# When another run's is being written just then.
_AGAIN_AFTER_S = 1.0
# The end of the name of a second copy.
_SECOND = "-second"

_written_decoder = msgspec.msgpack.Decoder(Written)


@dataclass(frozen=True, slots=True)
class _Pending:
    """One that the worker is writing; what it holds ends with the operation at ``position``."""

    position: Position
    reply: "asyncio.Future[bytes]"


class RunSnapshots:
    """The snapshots of one run. Not concurrent: the run's own task calls it.

    Args:
        every_s: seconds of work between two, more where that would cost over 2% of it.
        on_written: called when the one that was begun can be collected.
    """

    def __init__(
        self,
        run: RunRow,
        journal: Journal,
        blobs: LocalBlobs,
        outcomes: Outcomes,
        every_s: float,
        on_written: Callable[[], None],
    ) -> None:
        self._run = run
        self._journal = journal
        self._blobs = blobs
        self._outcomes = outcomes
        self._every_s = every_s
        self._on_written = on_written
        self._pending: _Pending | None = None
        self._work_s = 0.0
        self._not_before = 0.0
        self._cost_s = 0.0

    def worked(self, seconds: float) -> None:
        """The run's operations have taken so much of the worker's time."""
        self._work_s += seconds

    @property
    def is_due(self) -> bool:
        return (
            self._pending is None
            and self._work_s >= max(self._every_s, self._cost_s / MAX_SHARE)
            and time.monotonic() >= self._not_before
        )

    @property
    def is_pending(self) -> bool:
        return self._pending is not None

    async def begin(self, worker: WorkerClient, position: Position) -> None:
        """Have the worker copy the state behind the operation at ``position``, the last one that was sent to it."""
        assert self._pending is None
        if position == self._recorded:
            self._work_s = 0.0
            return
        aside = _key(self._run, position) + ".part"
        try:
            await asyncio.to_thread(self._blobs.prepare_folder, aside)
        except OSError as error:
            self._failed(error)
            return
        command = Snapshot(self._run.id, self._blobs.ref(aside), background=True)
        self._pending = _Pending(position, worker.call(command))
        self._pending.reply.add_done_callback(self._written)

    async def collect(self, is_complete: Callable[[Position], bool]) -> None:
        """Record the one that was begun, once it is on disk and everything that it holds has its outcome.

        Before that it must not count: a restart would carry out again what it holds already.
        """
        pending = self._pending
        if pending is None or not pending.reply.done() or not is_complete(pending.position):
            return
        try:
            written = _written_decoder.decode(pending.reply.result())
        except WorkerLost:
            await self.drop()
        except OperationFailed as error:
            if error.error_class == "Busy":
                self._not_before = time.monotonic() + _AGAIN_AFTER_S
            else:
                self._failed(error)
            await self.drop()
        else:
            await self._record(pending.position, newest_state(self._run))
            self._pending = None
            self._work_s, self._cost_s = 0.0, written.stall_s + written.cpu_s

    async def completed(self, is_complete: Callable[[Position], bool]) -> None:
        """Wait for the one that was begun, and record it."""
        if self._pending is not None:
            await asyncio.wait({self._pending.reply})
            await self.collect(is_complete)

    async def drop(self) -> None:
        """Let go of the one that was begun: its worker is gone, or it holds what must not be kept."""
        pending, self._pending = self._pending, None
        if pending is not None:
            await asyncio.to_thread(self._blobs.delete, _key(self._run, pending.position) + ".part")

    async def take(self, worker: WorkerClient, position: Position) -> None:
        """Store the state now, after the operation at ``position``.

        Raises:
            OperationFailed: it could not be stored.
        """
        assert self._pending is None
        if position != self._recorded:
            await self._write(worker, _key(self._run, position))
            await self._record(position, newest_state(self._run))
        self._work_s = 0.0

    async def take_twice(self, worker: WorkerClient, position: Position) -> None:
        """Store the state now, in two copies: nothing before the operation at ``position`` leads to it.

        Raises:
            OperationFailed: it could not be stored.
        """
        assert self._pending is None
        key = _key(self._run, position)
        await self._write(worker, key)
        await self._write(worker, key + _SECOND)
        await asyncio.to_thread(self._blobs.publish_folder, key + _SECOND + ".part", key + _SECOND)
        await self._record(position, StoredState(key + _SECOND, position, None))
        self._work_s = 0.0

    async def _write(self, worker: WorkerClient, key: str) -> None:
        try:
            await asyncio.to_thread(self._blobs.prepare_folder, key + ".part")
        except OSError as error:
            full = disk_full(error)
            if full is None:
                raise
            raise full from error
        await worker.call(Snapshot(self._run.id, self._blobs.ref(key + ".part")))

    @property
    def _recorded(self) -> Position:
        return self._run.snapshot_epoch, self._run.snapshot_seq

    async def _record(self, position: Position, older: StoredState) -> None:
        """Make it the newest, and ``older`` the one to go back to."""
        key, known = _key(self._run, position), {self._run.snapshot_key, self._run.older_key}
        # Where an error ended an earlier try of this, it lies there already.
        if self._blobs.exists(key + ".part"):
            await asyncio.to_thread(self._blobs.publish_folder, key + ".part", key)
        await self._outcomes.snapshot_taken(self._run, key, position, older)
        for gone in known - {None, key, older.key}:
            assert gone is not None
            await asyncio.to_thread(self._blobs.delete, gone)
        await self._journal.forget_payloads(self._run.id, older.position)

    def _failed(self, error: Exception) -> None:
        # It only shortens recovery: without it the journal has everything still.
        log.warning("run %s: no snapshot: %s", self._run.id, error)
        self._work_s = 0.0

    def _written(self, reply: "asyncio.Future[bytes]") -> None:
        if not reply.cancelled():
            reply.exception()  # Marks it as seen: a run that ends meanwhile does not come for it.
        self._on_written()


def _key(run: RunRow, position: Position) -> str:
    return f"snapshots/{run.id}/{position[0]}-{position[1]}"
