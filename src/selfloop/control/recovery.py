"""Back to where a run was: its last snapshot, then the journalled operations after it, in order."""

import asyncio
import logging
import time
from collections.abc import Iterable

import msgspec

from selfloop.control.journal import Journal
from selfloop.control.settle import Settlement
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.status import RunStatus
from selfloop.worker.client import WorkerClient
from selfloop.worker.protocol import Execute, OpenRun

log = logging.getLogger(__name__)


async def reopen(
    run: RunRow, worker: WorkerClient, journal: Journal, blobs: LocalBlobs, settlement: Settlement
) -> float:
    """Bring ``run`` into ``worker`` exactly as it was after its last finished operation.

    Results that were given out stay as they are: a replay only rebuilds the state.

    Returns:
        Seconds that the replay took: what a snapshot will spare the next recovery.

    Raises:
        OperationFailed: the state cannot be rebuilt; the cause names the operation.
        WorkerLost: the worker died on the way; the caller tries again.
    """
    initial = None if run.initial_key is None else str(blobs.path(run.initial_key))
    snapshot = None if run.snapshot_key is None else str(blobs.path(run.snapshot_key))
    targets = LoraTargets.parse(run.targets)
    await worker.call(OpenRun(run.id, run.initial_rank, run.seed, initial, snapshot, targets, run.with_optimizer))
    rows = await journal.to_replay(run)
    if rows:
        log.info("run %s: replaying %d operations", run.id, len(rows))
    started = time.monotonic()
    for row in rows:
        payload = await journal.payload(row)
        context = Execute(run.id, run.seed, initial=initial, targets=targets, alone=True)
        if row.kind == "load_state":
            context = msgspec.structs.replace(context, read_from=await settlement.read_from(run, payload))
        try:
            await worker.call(context, payload)
        except OperationFailed as error:
            raise OperationFailed(
                f"the run's state could not be rebuilt: replaying {row.kind} (seq_id {row.seq}) failed: {error}",
                "RecoveryFailed",
            ) from error
    return time.monotonic() - started


async def clear_leftovers(runs: Iterable[RunRow], blobs: LocalBlobs) -> None:
    """Remove snapshots and starting weights that a crash left half-written, unrecorded or without a run."""
    kept = {key for run in runs if run.status == RunStatus.ACTIVE for key in (run.snapshot_key, run.initial_key)}
    for run_id in list(blobs.children("snapshots")):
        for name in list(blobs.children(f"snapshots/{run_id}")):
            if (key := f"snapshots/{run_id}/{name}") not in kept:
                await asyncio.to_thread(blobs.delete, key)
    for run_id in list(blobs.children("initial")):
        if (key := f"initial/{run_id}") not in kept:
            await asyncio.to_thread(blobs.delete, key)
