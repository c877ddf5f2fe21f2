"""Hands each run's operations to its worker, in order, and brings the run back when the worker dies."""

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass

import msgspec

from selfloop.control.capacity.lifecycle import Lifecycle
from selfloop.control.data_dir.transient_errors import Setbacks, in_words
from selfloop.control.queue.journal import Failure, Journal, decoded
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.recovery import reopen
from selfloop.control.queue.run_memory import RunMemories
from selfloop.control.queue.run_queue import Queued, RunQueue
from selfloop.control.queue.saves_beside import SavesBeside
from selfloop.control.queue.snapshots import RunSnapshots
from selfloop.control.queue.stored_states import Position
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.blob_ref import BlobRef
from selfloop.types.errors import OperationFailed, WorkerLost, disk_full
from selfloop.types.logline import Scope, bind_only
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import LoadState, Operation, Save, kind_of, traits_of
from selfloop.types.settings import QueueSettings
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import CloseRun, Execute

log = logging.getLogger(__name__)

# Operations of one run that wait in the worker itself, so that it never idles between two of them.
_WINDOW = 3
# An operation that took its worker down this often is to blame.
_MAX_ATTEMPTS = 2
_MAX_REOPENINGS = 3
# Pause after an error of our own (disk, database) before the same thing is tried again.
_RETRY_S = 1.0


@dataclass(slots=True)
class _InFlight:
    queued: Queued
    reply: "asyncio.Future[bytes]"
    started: float


class RunActor:
    """Owns one run's queue. One task; everything about the run happens in it, in order."""

    def __init__(
        self,
        run: RunRow,
        journal: Journal,
        blobs: LocalBlobs,
        lifecycle: Lifecycle,
        outcomes: Outcomes,
        config: QueueSettings,
        memories: RunMemories,
    ) -> None:
        self.run = run
        self._journal = journal
        self._blobs = blobs
        self._lifecycle = lifecycle
        self._outcomes = outcomes
        self._config = config
        self._memories = memories
        self._memory = memories.of(run.model_name)
        self._waits_for_memory = ""
        self.accepting = asyncio.Lock()
        """Held while the run's order of arrival is looked at and changed."""
        self.queue = RunQueue(run)
        self._in_flight: deque[_InFlight] = deque()
        self._failed: list[Failure] = []
        self._wakeup = asyncio.Event()
        self._worker: WorkerClient | None = None
        self._snapshots = RunSnapshots(
            run, journal, blobs, outcomes, config.snapshot_every_s, on_written=self._wakeup.set
        )
        self._last_reply_at = 0.0
        self._last_done: Position | None = None
        self._suspend_requests: list[asyncio.Future[None]] = []
        self.saves_beside = SavesBeside(run, outcomes, on_asked=self._wakeup.set)
        self._completing = asyncio.Lock()
        self._halted = False
        self._num_lost_reopening = 0
        self._setbacks = Setbacks(f"run {run.id}")
        self._task = asyncio.create_task(self._drive(), name=f"run-{run.id}")

    # -- from outside ---------------------------------------------------------------------------------

    def push(self, row: OperationRow) -> None:
        self.queue.push(row)
        self._wakeup.set()

    def look_again(self) -> None:
        """The run's ``next_seq`` was moved on."""
        self._wakeup.set()

    def remove(self, operation_id: str) -> bool:
        """Take an operation out of the queue; False when it is no longer there to be taken."""
        removed = self.queue.remove(operation_id)
        self._wakeup.set()
        return removed

    def saves_named(self, name: str, kind: type[Operation]) -> bool:
        """Whether a save of that kind is waiting or running (its payload names the checkpoint)."""
        rows = [q.row for q in self.queue] + [f.queued.row for f in self._in_flight]
        asked = kind_of(kind)
        return any(row.kind == asked and row.payload is not None and _saved_name(row.payload) == name for row in rows)

    @property
    def is_busy(self) -> bool:
        """Whether something of the run is under way in the worker, or could be."""
        return bool(self._in_flight or (self.queue.ready is not None and not self._halted))

    def waiting_for(self, operation_id: str) -> str:
        """Why an operation has no result yet, in words."""
        if self._waits_for_memory:
            return self._waits_for_memory
        for flight in self._in_flight:
            if flight.queued.row.id == operation_id:
                return "running" if flight is self._in_flight[0] else "next in the worker's queue"
        if self._in_flight or self._worker is not None:
            missing = self.queue.missing_seq
            if missing is not None:
                return f"waiting for the operation with seq_id {missing}"
            return f"queued behind {len(self._in_flight)} running and earlier queued operations of this run"
        return self._lifecycle.describe(self.run.deployment_id) or "queued"

    async def suspend(self) -> None:
        """Store the run's state and take it out of the worker, once it has nothing to do."""
        if self._worker is None or self._task.done():
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._suspend_requests.append(done)
        self._wakeup.set()
        await done

    async def halt(self) -> None:
        """Let the running operations finish, store the state, and start nothing more."""
        self._halted = True
        await self.suspend()

    async def stop(self) -> None:
        # An outcome that is just being stored is also sent to those who wait for it.
        async with self._completing:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._end_suspend_requests()
        self.saves_beside.end()

    async def close(self) -> None:
        """Forget the run in the worker (it was deactivated)."""
        await self.stop()
        self._memory.leave(self.run.id)
        if self._worker is not None and not self._worker.lost.done():
            # Not waited for: an operation of the run may still be under way there.
            self._worker.call(CloseRun(self.run.id)).add_done_callback(_seen)

    def drain(self) -> list[OperationRow]:
        """What has no outcome yet; for a run that ends."""
        rows = [f.row for f in self._failed] + [f.queued.row for f in self._in_flight]
        rows += [queued.row for queued in self.queue.clear()]
        self._failed.clear()
        self._in_flight.clear()
        return rows

    # -- the run's own task ---------------------------------------------------------------------------

    async def _drive(self) -> None:
        bind_only(Scope(team_id=self.run.team_id, deployment_id=self.run.deployment_id, run_id=self.run.id))
        while True:
            self._wakeup.clear()
            try:
                await self._turn()
            except Exception as error:  # The actor's edge: a full disk or a locked database must not end the run.
                await self._pause(error)
            else:
                self._setbacks.over()

    async def _pause(self, error: Exception) -> None:
        """After an error of our own: what passes is waited for; any other ends what was accepted, with its cause."""
        if self._setbacks.met(error):
            cause = f"the server cannot carry this on: {type(error).__name__}: {in_words(error)}"
            self._failed += [Failure(row, cause, "InternalError") for row in self._let_go()]
        await asyncio.sleep(_RETRY_S)

    def _let_go(self) -> list[OperationRow]:
        """Everything without an outcome; the worker may have gone on meanwhile, so the run is opened anew."""
        for flight in self._in_flight:
            flight.reply.add_done_callback(_seen)
        worker, self._worker = self._worker, None
        if worker is not None and not worker.lost.done():
            worker.call(CloseRun(self.run.id)).add_done_callback(_seen)
        kept, self._failed = self._failed, []
        rows = self.drain()
        self._failed = kept
        return rows

    async def _turn(self) -> None:
        try:
            await self._complete_failed()
            await self._snapshots.collect(self._is_complete)
            await self._fill()
            await self._send_saves_beside()
            if self._in_flight:
                await self._await_head()
            elif self._suspend_requests:
                await self._suspend_now()
            elif len(self.queue) and not self._halted:
                await self._await_missing()
            else:
                await self._wakeup.wait()
        except WorkerLost as lost:
            await self._recover(lost)
        except OperationFailed as error:
            # The base model cannot be served, or the run's state cannot be brought back.
            self._failed += [Failure(row, str(error), error.error_class) for row in self.drain()]
            self.saves_beside.refuse(error)
            self._wakeup.set()

    async def _complete_failed(self) -> None:
        """Store the outcomes of what failed; while they cannot be stored, the run waits."""
        if self._failed:
            async with self._completing:
                await self._outcomes.fail(*self._failed)
                self._failed.clear()

    async def _fill(self) -> None:
        while (queued := self._next()) is not None:
            if queued.num_attempts >= _MAX_ATTEMPTS:
                cause = f"it ended its worker {queued.num_attempts} times: {queued.cause}"
                await self._fail_queued(queued, cause, "WorkerLost")
                continue
            if queued.num_attempts > queued.row.num_attempts:
                # Durable before it is tried again, as what it does may end the gateway, too.
                await self._journal.note_attempts(queued.row, queued.num_attempts)
            with self._lifecycle.using(self.run.deployment_id):
                worker = await self._open()
                try:
                    payload = await self._journal.payload(queued.row)
                    # A suspect of the worker's death gets no company, so that only the culprit can be blamed again.
                    command = await self._command(queued.row, payload, alone=queued.num_attempts > 0)
                except OperationFailed as error:
                    await self._fail_queued(queued, str(error), error.error_class)
                    continue
            if self.queue.ready is not queued:
                continue  # Cancelled while the worker was loading.
            self.queue.pop()
            reply = worker.call(command, payload)
            self._in_flight.append(_InFlight(queued, reply, time.monotonic()))
            self._outcomes.observer.begun(queued.row)
            await self._begin_snapshot()

    async def _send_saves_beside(self) -> None:
        if not self.saves_beside or self._halted:
            return
        if self._in_flight and (self._worker is None or self._worker.lost.done()):
            return  # First what a lost worker still answered is completed, as for any operation.
        with self._lifecycle.using(self.run.deployment_id):
            await self.saves_beside.send(await self._open())

    async def _fail_queued(self, queued: Queued, error: str, error_class: str) -> None:
        self.remove(queued.row.id)
        self._failed.append(Failure(queued.row, error, error_class))
        await self._complete_failed()

    def _next(self) -> Queued | None:
        """What may be sent now."""
        queued = self.queue.ready
        if queued is None or self._halted or self._suspend_requests:
            return None
        if self._snapshots.is_pending and queued.is_exclusive:
            return None
        if not self._in_flight:
            return queued
        if self._worker is None or self._worker.lost.done():
            # First complete what a lost worker still answered: recovery replays completed operations only.
            return None
        # A load reads files that an operation before it may still be writing, and is followed by a snapshot that
        # must not contain operations later than its position. So both find the worker's queue empty.
        if queued.is_exclusive or self._in_flight[-1].queued.is_exclusive:
            return None
        return queued if len(self._in_flight) < _WINDOW else None

    async def _open(self) -> WorkerClient:
        if self._worker is not None and not self._worker.lost.done():
            return self._worker
        worker = await self._lifecycle.wake(self.run.deployment_id)
        try:
            num_bytes = await self._memories.open_bytes(self.run)
            await self._memory.enter(self.run.id, self, worker, num_bytes, self._wait_for_memory)
            replayed_s = await reopen(self.run, worker, self._journal, self._blobs, self._outcomes)
        except OperationFailed:
            self._memory.leave(self.run.id)
            raise
        except WorkerLost as lost:
            self._memory.leave(self.run.id)
            if lost.by_kernel and self._memory.num_open(worker) > 0:
                self._memory.ended_by_kernel(worker)
                raise
            self._num_lost_reopening += 1
            if self._num_lost_reopening < _MAX_REOPENINGS:
                raise
            self._num_lost_reopening = 0
            cause = f"the worker died {_MAX_REOPENINGS} times while rebuilding the run's state: {lost}"
            raise OperationFailed(cause, "RecoveryFailed") from None
        self._num_lost_reopening = 0
        # As if it were new work: or else deaths in short order would have ever more replayed.
        self._snapshots.worked(replayed_s)
        self._worker = worker
        return worker

    def _wait_for_memory(self, reason: str) -> None:
        if reason and not self._waits_for_memory:
            log.info("run %s: %s", self.run.id, reason)
        self._waits_for_memory = reason

    async def _command(self, row: OperationRow, payload: bytes, *, alone: bool) -> Execute:
        targets = LoraTargets.parse(self.run.targets)
        context = Execute(
            self.run.id, self.run.seed, initial=self._folder(self.run.initial_key), targets=targets, alone=alone
        )
        kind = traits_of(row.kind)
        if not (kind.reads_checkpoint or kind.writes_checkpoint):
            return context
        operation = decoded(payload)
        if isinstance(operation, LoadState):
            return msgspec.structs.replace(context, read_from=await self._outcomes.read_from(self.run, operation))
        if isinstance(operation, Save):
            try:
                write_to = await self._outcomes.write_to(self.run, operation)
            except OSError as error:
                raise disk_full(error) or error from error
            return msgspec.structs.replace(context, write_to=write_to)
        return context

    def _folder(self, key: str | None) -> BlobRef | None:
        return None if key is None else self._blobs.ref(key)

    async def _await_head(self) -> None:
        flight = self._in_flight[0]
        with self._lifecycle.using(self.run.deployment_id):
            wakeup = asyncio.ensure_future(self._wakeup.wait())
            try:
                await asyncio.wait({flight.reply, wakeup}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                wakeup.cancel()
            if not flight.reply.done():
                return
            row = flight.queued.row
            try:
                body = flight.reply.result()
            except OperationFailed as error:
                if traits_of(row.kind).writes_checkpoint:
                    await self._outcomes.discard(row)
                self._in_flight.popleft()
                self._failed.append(Failure(row, str(error), error.error_class))
                if error.state_lost:
                    self._return_in_flight()
                    self._worker = None
                    self._memory.leave(self.run.id)
                await self._complete_failed()
                if error.state_lost:
                    await self._snapshots.drop()
                return
            # It began when it was sent, or when the one before it ended.
            now = time.monotonic()
            self._snapshots.worked(now - max(flight.started, self._last_reply_at))
            self._last_reply_at = now
            if traits_of(row.kind).exclusive and not await self._pin_loaded(flight):
                return
            async with self._completing:
                await self._outcomes.done(self.run, row, body)
                self._in_flight.popleft()
            self._last_done = (row.epoch, row.seq)
            self._memory.used(self.run.id)
            await self._begin_snapshot()

    async def _pin_loaded(self, flight: _InFlight) -> bool:
        """Store the state just loaded: the checkpoint may be deleted, so recovery must never need to load it again."""
        row = flight.queued.row
        assert self._worker is not None
        try:
            await self._snapshots.take_twice(self._worker, (row.epoch, row.seq))
        except OperationFailed as error:
            # What cannot be kept was not loaded: the run goes back to its state before.
            self._in_flight.popleft()
            self._failed.append(Failure(row, f"the loaded state could not be stored: {error}", error.error_class))
            await self._close_in_worker()
            await self._complete_failed()
            return False
        return True

    async def _begin_snapshot(self) -> None:
        """Have the state behind what was sent last written, if it is time, while the worker goes on."""
        if not self._snapshots.is_due or self._worker is None or self._worker.lost.done():
            return
        last = self._in_flight[-1].queued if self._in_flight else None
        if last is not None and last.is_exclusive:
            return  # It is followed by one of its own.
        position = self._last_done if last is None else last.position
        if position is not None:
            await self._snapshots.begin(self._worker, position)

    def _is_complete(self, position: Position) -> bool:
        """Whether everything of the run up to ``position`` that was ever sent to a worker has its outcome."""
        return not any(flight.queued.position <= position for flight in self._in_flight)

    async def _close_in_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and not worker.lost.done():
            await worker.call(CloseRun(self.run.id))
        self._memory.leave(self.run.id)

    async def _await_missing(self) -> None:
        try:
            await asyncio.wait_for(self._wakeup.wait(), self._config.gap_grace_s)
        except TimeoutError:
            await self._give_up_gap()

    async def _give_up_gap(self) -> None:
        async with self.accepting:
            missing = self.queue.missing_seq
            if missing is None:
                return  # It came at the last moment.
            await self._journal.skip_gap(self.run, max(self.queue).row.seq + 1)
            waiting = self.queue.clear()
        cause = f"the operation with seq_id {missing} did not arrive within {self._config.gap_grace_s:g} s"
        for row in (queued.row for queued in waiting):
            error = f"{cause}, so this one (seq_id {row.seq}) was not run"
            self._failed.append(Failure(row, error, "MissingOperation"))
        await self._complete_failed()

    def _end_suspend_requests(self) -> None:
        requests, self._suspend_requests = self._suspend_requests, []
        for request in requests:
            if not request.done():
                request.set_result(None)

    async def _suspend_now(self) -> None:
        try:
            await self._snapshots.completed(self._is_complete)
            if self._worker is not None and not self._worker.lost.done() and self._last_done is not None:
                try:
                    await self._snapshots.take(self._worker, self._last_done)
                except OperationFailed as error:
                    # It only shortens recovery: without it the journal has everything still.
                    log.warning("run %s: no snapshot: %s", self.run.id, error)
            await self._close_in_worker()
        finally:
            self._end_suspend_requests()

    async def _recover(self, lost: WorkerLost) -> None:
        log.warning("run %s lost its worker: %s", self.run.id, lost)
        worker, self._worker = self._worker, None
        others = 0 if worker is None else self._memory.num_open(worker) - 1
        if worker is not None and lost.by_kernel:
            self._memory.ended_by_kernel(worker)
        returned = self._return_in_flight()
        # Of several runs none is to blame for what all of them took.
        if returned and lost.begun and not (lost.by_kernel and others > 0):
            returned[0].blame(str(lost))
        # Of what it holds, something may be sent once more.
        await self._snapshots.drop()

    def _return_in_flight(self) -> list[Queued]:
        """Put what was sent and not completed back into the queue."""
        returned = [flight.queued for flight in self._in_flight]
        for flight in self._in_flight:
            flight.reply.add_done_callback(_seen)
        self._in_flight.clear()
        self.queue.put_back(returned)
        return returned


def _seen(future: "asyncio.Future[bytes]") -> None:
    if not future.cancelled():
        future.exception()


def _saved_name(payload: bytes) -> str | None:
    try:
        return getattr(decoded(payload), "name", None)
    except msgspec.DecodeError:
        return None  # Its row is damaged: it fails with its turn.
