"""The outcome of an operation, with everything it changes, in one transaction; then its waiters wake."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.data_dir.disk_space import DiskRoom
from selfloop.control.observe.measurements import measured_by
from selfloop.control.observe.observer import Observer
from selfloop.control.observe.usage import Counts, counts_of, operation_key
from selfloop.control.queue.journal import Failure, Journal
from selfloop.control.queue.stored_states import Position, StoredState, older_state
from selfloop.control.queue.waiters import Announcements, AwaitedOutcomes, Topics
from selfloop.control.resources.checkpoints import retention
from selfloop.control.resources.new_rows import new_checkpoint
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.db import (
    queries_audit,
    queries_checkpoints,
    queries_metrics,
    queries_observations,
    queries_operations,
    queries_resources,
)
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import CheckpointRow, OperationRow, RunRow
from selfloop.types.blob_ref import BlobRef
from selfloop.types.errors import OperationFailed, disk_full
from selfloop.types.operation import (
    CHANGES_STATE,
    LoadState,
    Save,
    SaveState,
    SaveWeightsForSampler,
    traits_of,
)
from selfloop.types.resources import Checkpoint
from selfloop.types.result import InitResult, LoadResult, Result, SaveResult, StepResult, result_decoder
from selfloop.types.status import OperationState
from selfloop.types.uris import parse_checkpoint_uri

log = logging.getLogger(__name__)

_NUM_RECENT = 128


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operation ended; ``result`` is the msgpack of a ``types.result`` struct, None with an error."""

    result: bytes | None
    error: str | None = None
    error_class: str | None = None


class Outcomes:
    """Writes outcomes.

    Args:
        disk_room: refuses saves that do not fit.
        on_saved: hears of a run's saved weights, once they are durable.
    """

    def __init__(
        self,
        db: Database,
        store: CheckpointStore,
        journal: Journal,
        observer: Observer,
        disk_room: DiskRoom,
        on_saved: Callable[[RunRow, SaveResult], None],
    ) -> None:
        self._db = db
        self._store = store
        self._journal = journal
        self._disk_room = disk_room
        self._on_saved = on_saved
        self.observer = observer
        self.awaited: AwaitedOutcomes[Outcome] = AwaitedOutcomes(lambda o: len(o.result or b""), _NUM_RECENT)
        self.published = Announcements()
        """That a sampler may have newer weights."""
        self.measured = Topics()
        """By run: that one of its operations has ended and left its numbers, or that the run has ended."""

    async def read_from(self, run: RunRow, operation: LoadState) -> BlobRef:
        """The folder that a load reads. Raises :class:`OperationFailed` when the checkpoint is gone."""
        uri = parse_checkpoint_uri(operation.path)
        async with self._db.look_up() as session:
            row = await queries_checkpoints.named(session, uri.run_id, uri.target, uri.name)
        if row is None or not row.may_be_read_by(run.team_id, operation.reader_team_id):
            raise OperationFailed(f"checkpoint {operation.path} does not exist any more", "NotFound")
        try:
            return self._store.ref(await self._store.folder(row.id))
        except FileNotFoundError:
            raise OperationFailed(f"the files of checkpoint {operation.path} are gone", "NotFound") from None

    async def write_to(self, run: RunRow, operation: Save) -> BlobRef:
        """The folder that a save writes, aside until it is whole. Raises :class:`OperationFailed` without room."""
        await self._disk_room.check_save(run, with_optimizer=isinstance(operation, SaveState))
        return self._store.ref(self._store.staging(operation.checkpoint_id))

    async def discard(self, row: OperationRow) -> None:
        """Remove what a save that failed has written."""
        try:
            operation = await self._journal.operation(row)
        except OperationFailed:
            return  # What it was to write is no longer known; the next start clears it away.
        if isinstance(operation, Save):
            await self._store.discard(operation.checkpoint_id)

    async def done(self, run: RunRow, row: OperationRow, body: bytes) -> None:
        """Store a result and what it changes in the run's resources."""
        result = result_decoder.decode(body)
        counts = counts_of(row, result)
        gone: list[str] = []
        operation: Save | None = None
        if isinstance(result, SaveResult):
            try:
                operation = await self._published(row, result)
            except OperationFailed as error:
                await self._store.discard(result.checkpoint_id)
                await self.fail(Failure(row, str(error), error.error_class))
                return
        stored = await self._journal.store_result(row, body)
        counted = _one_more(run, row)
        async with self._db.write() as session:
            finishing = queries_operations.finishing(
                row,
                state=OperationState.DONE,
                at=time.time(),
                result=stored.inline,
                result_key=stored.key,
                result_digest=stored.digest,
            )
            completed = queries_operations.is_changed(await session.execute(finishing))
            if completed:
                if counted:
                    await queries_resources.update_run(session, run.id, **counted)
                # In this transaction: what is replayed or completed twice counts once.
                await _note(session, run, row, result, counts)
            if isinstance(result, SaveResult):
                assert operation is not None
                gone = await _add_checkpoint(session, run, row, operation, result)
            else:
                await _update_run(session, run, result)
        for id in gone:
            await self._store.delete(id)
        if completed:
            for name, value in counted.items():
                setattr(run, name, value)
            self.observer.finished(run, row, result, counts)
            self.awaited.complete((row.run_id, row.id), Outcome(body))
            self.measured.announce(run.id)
            if isinstance(result, SaveResult):
                self._on_saved(run, result)
        if operation is not None:
            self.published.announce()

    async def saved_beside(self, run: RunRow, operation: SaveWeightsForSampler, body: bytes) -> Checkpoint:
        """Record what was saved beside the run's operations. Raises :class:`OperationFailed` when it is gone."""
        result = result_decoder.decode(body)
        assert isinstance(result, SaveResult)
        await self._publish(result.checkpoint_id)
        checkpoint = _checkpoint_row(run, operation, result)
        async with self._db.write() as session:
            session.add(checkpoint)
        self._on_saved(run, result)
        return checkpoint.view()

    async def _published(self, row: OperationRow, result: SaveResult) -> Save:
        """The save whose files have their name now. Raises :class:`OperationFailed`."""
        operation = await self._journal.operation(row)
        assert isinstance(operation, Save)
        await self._publish(result.checkpoint_id)
        return operation

    async def _publish(self, checkpoint_id: str) -> None:
        try:
            await self._store.publish(checkpoint_id)
        except FileNotFoundError:
            raise OperationFailed("what was saved is gone before it could be recorded", "CheckpointLost") from None
        except OSError as error:
            full = disk_full(error)
            if full is None:
                raise
            raise full from error

    async def fail(self, *failures: Failure) -> None:
        """Store errors as the operations' outcomes: of all of them, or of none."""
        if not failures:
            return
        for row, error, error_class, state in await self._journal.fail(failures):
            self.observer.failed(row, error, error_class, state)
            self.awaited.complete((row.run_id, row.id), Outcome(None, error, error_class))

    async def snapshot_taken(self, run: RunRow, key: str, position: Position, older: StoredState) -> None:
        """Record the newest stored state of a run, and the one to go back to if it is damaged."""
        async with self._db.write() as session:
            after = await queries_operations.num_done_after(session, run.id, position, CHANGES_STATE)
            changes = None if run.num_changes is None else run.num_changes - after
            # A second copy holds what the first does.
            older_changes = changes if older.position == position else older.num_changes
            changed: dict[str, str | int | None] = {
                "snapshot_key": key,
                "snapshot_epoch": position[0],
                "snapshot_seq": position[1],
                "snapshot_changes": changes,
                "older_key": older.key,
                "older_epoch": older.position[0],
                "older_seq": older.position[1],
                "older_changes": older_changes,
            }
            await queries_resources.update_run(session, run.id, **changed)
        for name, value in changed.items():
            setattr(run, name, value)

    async def fell_back(self, run: RunRow, older: StoredState) -> None:
        """Record that the newest stored state was damaged, and the older one is all there is."""
        changed: dict[str, str | int | None] = {
            "snapshot_key": older.key,
            "snapshot_epoch": older.position[0],
            "snapshot_seq": older.position[1],
            "snapshot_changes": older.num_changes,
            "older_key": None,
            "older_epoch": None,
            "older_seq": None,
            "older_changes": None,
        }
        async with self._db.write() as session:
            await queries_resources.update_run(session, run.id, **changed)
        for name, value in changed.items():
            setattr(run, name, value)


def _one_more(run: RunRow, row: OperationRow) -> dict[str, int]:
    """The run's counts of operations that changed it, with this one; none where it does not, or nothing is counted."""
    if run.num_changes is None or not traits_of(row.kind).changes_state:
        return {}
    counts, position = {"num_changes": run.num_changes + 1}, (row.epoch, row.seq)
    # A load is in its stored states before it has its outcome.
    if run.snapshot_changes is not None and position <= (run.snapshot_epoch, run.snapshot_seq):
        counts["snapshot_changes"] = run.snapshot_changes + 1
    older = older_state(run)
    if older is not None and older.num_changes is not None and position <= older.position:
        counts["older_changes"] = older.num_changes + 1
    return counts


async def _note(session: AsyncSession, run: RunRow, row: OperationRow, result: Result, counts: Counts) -> None:
    """What a finished operation took, and what it measured."""
    now = time.time()
    await queries_observations.add_usage(session, operation_key(run, row, now), counts)
    if (measured := measured_by(run, row, result, now)) is not None:
        await queries_metrics.add(session, run.id, measured)


async def _update_run(session: AsyncSession, run: RunRow, result: object) -> None:
    """What a result that makes no checkpoint changes in the run."""
    match result:
        case InitResult(step=step, lora_rank=rank) | LoadResult(step=step, lora_rank=rank):
            run.step, run.lora_rank = step, rank
            await queries_resources.update_run(session, run.id, step=step, lora_rank=rank)
        case StepResult(metrics):
            run.step = int(metrics["step"])
            await queries_resources.update_run(session, run.id, step=run.step)
        case _:
            pass


async def _add_checkpoint(
    session: AsyncSession, run: RunRow, row: OperationRow, operation: Save, result: SaveResult
) -> list[str]:
    """Add the checkpoint and lead samplers to it; returns the ids of those whose place it takes."""
    gone: list[str] = []
    checkpoint = _checkpoint_row(run, operation, result)
    old = await queries_checkpoints.holder_of_name(session, run.id, checkpoint.target, checkpoint.name)
    if old is not None:
        gone.append(old.id)
        await queries_checkpoints.remove(session, old.id)
        await session.flush()
    session.add(checkpoint)
    if checkpoint.sampler_id is None:
        size, key_id = str(checkpoint.size_bytes), row.key_id or run.key_id
        queries_audit.record_checkpoint(session, "saved", checkpoint.view(), run.team_id, key_id, size_bytes=size)
    if isinstance(operation, SaveWeightsForSampler) and operation.publish:
        for sampler in await queries_resources.samplers(session, run_id=run.id):
            await queries_resources.update_sampler(
                session, sampler.id, live_checkpoint_id=checkpoint.id, live_version=result.step
            )
    await session.flush()
    if isinstance(operation, SaveWeightsForSampler) and operation.inflight:
        gone += await _lead_followers(session, run, checkpoint)
    for surplus in await retention.beyond_last(session, run.view(), checkpoint.target):
        gone.append(surplus.id)
        await queries_checkpoints.remove(session, surplus.id)
    return gone


async def _lead_followers(session: AsyncSession, run: RunRow, checkpoint: CheckpointRow) -> list[str]:
    """Point every follower of the run to its newest checkpoint; returns the ids of those that this replaces."""
    followers = [sampler.id for sampler in await queries_resources.followers(session, run.id)]
    for id in followers:
        await queries_resources.update_sampler(session, id, checkpoint_id=checkpoint.id)
    owned = await queries_checkpoints.of_samplers(session, followers)
    replaced = [old.id for old in owned if old.id != checkpoint.id]
    for id in replaced:
        await queries_checkpoints.remove(session, id)
    return replaced


def _checkpoint_row(run: RunRow, operation: Save, result: SaveResult) -> CheckpointRow:
    metadata = operation.user_metadata
    return new_checkpoint(
        run,
        id=result.checkpoint_id,
        name=result.name,
        target=result.target,
        step=result.step,
        lora_rank=result.lora_rank,
        lora_alpha=result.lora_alpha,
        size_bytes=result.size_bytes,
        ttl_seconds=operation.ttl_seconds,
        sampler_id=operation.sampler_id if isinstance(operation, SaveWeightsForSampler) else None,
        targets=run.targets,
        user_metadata=None if metadata is None else msgspec.json.encode(metadata).decode(),
    )
