"""Back to where a run was: a stored state, then the journalled operations after it, in order."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from selfloop.control.data_dir.transient_errors import in_words, is_passing
from selfloop.control.queue.journal import Journal, decoded
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.stored_states import Position, StoredState, newest_state, older_state
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.digests import digest_of
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import LoadState, traits_of
from selfloop.types.resources import Run
from selfloop.types.status import RunStatus
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import Execute, OpenRun

log = logging.getLogger(__name__)

# How an engine refuses files.
_DAMAGED = ("CheckpointDamaged", "CheckpointInvalid")


class _Files(NamedTuple):
    """What a run is brought back from."""

    journal: Journal
    blobs: LocalBlobs
    outcomes: Outcomes


async def reopen(run: RunRow, worker: WorkerClient, journal: Journal, blobs: LocalBlobs, outcomes: Outcomes) -> float:
    """Bring ``run`` into ``worker`` exactly as it was after its last finished operation.

    Results that were given out stay as they are: a replay only rebuilds the state. A damaged snapshot is replaced by
    the one before it and a longer replay.

    Returns:
        Seconds that the replay took: what a snapshot will spare the next recovery.

    Raises:
        OperationFailed: the state cannot be rebuilt; the cause names the operation or the file.
        WorkerLost: the worker died on the way; the caller tries again.
    """
    if run.digest not in (None, identity(run)):
        raise _failed("its row in the database is damaged: rank, seed or targets are not those that it was made with")
    files, newest = _Files(journal, blobs, outcomes), newest_state(run)
    try:
        await _open(run, worker, files, newest)
    except OperationFailed as error:
        if error.error_class not in _DAMAGED:
            raise
        older = older_state(run)
        if newest.key is None:
            raise _failed(f"what it started from cannot be read: {error}") from error
        if older is None:
            raise _failed(f"its snapshot cannot be used, and there is none before it: {error}") from error
        log.error("run %s: its snapshot cannot be used: %s; going back to the one before it", run.id, error)
        try:
            replayed_s = await _bring_back(run, worker, files, older)
        except OperationFailed as second:
            raise _failed(f"its snapshot cannot be used: {error}; nor can the one before it: {second}") from second
        await outcomes.fell_back(run, older)
        return replayed_s
    return await _replay(run, worker, files, newest)


def identity(run: Run | RunRow) -> str:
    """Digest of what never changes of a run, and decides what is computed."""
    fixed = (run.id, run.model_name, run.initial_rank, run.seed, run.targets, run.initial_key, run.with_optimizer)
    return digest_of(msgspec.json.encode(fixed))


def _failed(cause: str) -> OperationFailed:
    return OperationFailed(f"the run's state could not be rebuilt: {cause}", "RecoveryFailed")


async def _bring_back(run: RunRow, worker: WorkerClient, files: _Files, state: StoredState) -> float:
    await _open(run, worker, files, state)
    return await _replay(run, worker, files, state)


async def _open(run: RunRow, worker: WorkerClient, files: _Files, state: StoredState) -> None:
    initial = None if run.initial_key is None else files.blobs.ref(run.initial_key)
    snapshot = None if state.key is None else files.blobs.ref(state.key)
    targets = LoraTargets.parse(run.targets)
    await worker.call(OpenRun(run.id, run.initial_rank, run.seed, initial, snapshot, targets, run.with_optimizer))


async def _replay(run: RunRow, worker: WorkerClient, files: _Files, state: StoredState) -> float:
    try:
        rows = await files.journal.to_replay(run, state.position)
    except SQLAlchemyError as error:
        if is_passing(error):
            raise
        raise _failed(f"the database cannot give out its operations: {in_words(error)}") from error
    await _check(run, rows, files.journal, state)
    if rows:
        log.info("run %s: replaying %d operations", run.id, len(rows))
        info = await worker.ready
        if not info.can.exact_replay:
            log.warning("run %s: what is replayed on %s may differ in its last bits", run.id, info.device)
    initial = None if run.initial_key is None else files.blobs.ref(run.initial_key)
    started = time.monotonic()
    for row in rows:
        payload = await files.journal.payload(row)
        context = Execute(run.id, run.seed, initial=initial, targets=LoraTargets.parse(run.targets), alone=True)
        try:
            operation = decoded(payload) if traits_of(row.kind).reads_checkpoint else None
            if isinstance(operation, LoadState):
                context = msgspec.structs.replace(context, read_from=await files.outcomes.read_from(run, operation))
            await worker.call(context, payload)
        except OperationFailed as error:
            raise _failed(f"replaying {row.kind} (seq_id {row.seq}, operation {row.id}) failed: {error}") from error
    return time.monotonic() - started


async def _check(run: RunRow, rows: Sequence[OperationRow], journal: Journal, state: StoredState) -> None:
    """Before anything is computed: is everything there that is to be done again?"""
    if run.num_changes is not None and state.num_changes is not None:
        expected = run.num_changes - state.num_changes
        if len(rows) != expected:
            after = "its start" if state.key is None else f"its snapshot at {_shown(state.position)}"
            raise _failed(f"{expected} operations changed it after {after}, and the database has {len(rows)} of them")
    for row in rows:
        try:
            await journal.payload(row)
        except OperationFailed as error:
            raise _failed(str(error)) from error


def _shown(position: Position) -> str:
    epoch, seq = position
    return f"seq_id {seq}" if epoch == 0 else f"seq_id {seq} of client {epoch}"


async def clear_leftovers(db: Database, blobs: LocalBlobs) -> None:
    """Remove snapshots and starting weights that a crash left half-written, unrecorded or without a run."""
    async with db.read() as session:
        there = {*blobs.children("snapshots"), *blobs.children("initial")}
        runs = (await queries_resources.runs_named(session, there)).values()
    active = [run for run in runs if run.status == RunStatus.ACTIVE]
    kept = {key for run in active for key in (run.snapshot_key, run.older_key, run.initial_key)}
    for run_id in list(blobs.children("snapshots")):
        for name in list(blobs.children(f"snapshots/{run_id}")):
            if (key := f"snapshots/{run_id}/{name}") not in kept:
                await asyncio.to_thread(blobs.delete, key)
    for run_id in list(blobs.children("initial")):
        if (key := f"initial/{run_id}") not in kept:
            await asyncio.to_thread(blobs.delete, key)
