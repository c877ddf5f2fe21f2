"""The operation queue as the dialects see it: accept, wait for, cancel."""

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from selfloop.control.context import Context
from selfloop.control.data_dir.transient_errors import TRANSIENT_ERRORS, Ages, tried
from selfloop.control.queue.journal import Submission, cancelled, encoded, first_missing
from selfloop.control.queue.outcomes import Outcome
from selfloop.control.queue.recovery import clear_leftovers
from selfloop.control.queue.run_actor import RunActor
from selfloop.storage.db import queries_checkpoints, queries_resources
from selfloop.storage.db.tables import OperationRow
from selfloop.types.errors import BadRequest, Conflict, NotFound, OperationFailed, SelfloopError, Unavailable
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    LoadState,
    Operation,
    SaveState,
    SaveWeightsForSampler,
)
from selfloop.types.resources import Checkpoint, Run
from selfloop.types.status import CheckpointTarget, OperationState, RunStatus
from selfloop.types.uris import CheckpointUri, parse_checkpoint_uri

log = logging.getLogger(__name__)

RESULT_KEPT_S = 3600.0
_PURGE_EVERY_S = 60.0
# Refused calls further ahead than this are not remembered: no client sends so many at a time.
_SKIPPED_AHEAD = 1024
_REFUSALS_COUNT = 1024
# Token ids of an operation that is encoded beside the event loop.
_LARGE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Pending:
    """An operation without an outcome yet, and why."""

    reason: str


class Refusal(NamedTuple):
    """What a call was answered that did not become an operation; ``digest`` identifies a repetition of it."""

    digest: str
    error: SelfloopError


class Operations:
    def __init__(self, context: Context) -> None:
        self._c = context
        self._awaited = context.outcomes.awaited
        self._skipped: dict[str, set[tuple[int, int]]] = {}
        self._refused: OrderedDict[tuple[str, int], Refusal] = OrderedDict()
        self._purger: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up every operation that was accepted before a restart, and clear away what it left half-done."""
        await clear_leftovers(self._c.db, self._c.blobs)
        await self._c.journal.clear_leftovers()
        queued = await self._c.journal.queued()
        async with self._c.db.read() as session:
            runs = await queries_resources.run_rows(session, {row.run_id for row in queued})
        for row in queued:
            run = runs[row.run_id]
            if run.status != RunStatus.ACTIVE:
                await self._c.outcomes.fail(cancelled(row, f"run {run.id} was deactivated"))
                continue
            self._awaited.expect((row.run_id, row.id))
            self._c.outcomes.observer.accepted(run, row)
            self._c.scheduler.adopt(run).push(row)
        for run_id, epoch, seq in await self._c.journal.skipped():
            self._skipped.setdefault(run_id, set()).add((epoch, seq))
        for run_id in list(self._skipped):
            if (actor := self._c.scheduler.known(run_id)) is not None:
                async with actor.accepting:
                    await self._pass_skipped(actor)
        if queued:
            log.info("resuming %d queued operations", len(queued))
        self._purger = asyncio.create_task(self._purge(), name="purge-results")

    async def stop(self) -> None:
        """Send the long polls home; their clients ask again."""
        self._awaited.send_home()
        if self._purger is not None:
            self._purger.cancel()
            await asyncio.gather(self._purger, return_exceptions=True)

    async def accept(self, run: Run, submission: Submission, operation: Operation) -> str:
        """Make an operation durable and queue it; returns its id.

        Raises:
            Conflict: the run is inactive, or the id or sequence id was used for a different request.
            NotReady: the disk is full.
            Unavailable: it needs the store of checkpoints (a load of what is at hand does not), or the database, which
                cannot be reached.
        """
        if run.status != RunStatus.ACTIVE:
            raise Conflict(
                f"run {run.id} is INACTIVE: it was deactivated and takes no more operations", reason="RUN_INACTIVE"
            )
        payload = await _encoded(operation)
        self._c.disk_room.check_accept(len(payload))
        if operation.reads_checkpoint or operation.writes_checkpoint:
            await self._check_store(operation)
        actor = await self._c.scheduler.actor(run.id)
        async with actor.accepting:
            accepted = await self._c.journal.accept(actor.run, submission, payload, actor.queue.out_of_order_seqs())
            self._c.lifecycle.touch(run.deployment_id)
            if accepted.is_new:
                self._awaited.expect((run.id, accepted.row.id))
                self._c.outcomes.observer.accepted(actor.run, accepted.row)
                actor.push(accepted.row)
                await self._pass_skipped(actor)
        return accepted.row.id

    async def _check_store(self, operation: Operation) -> None:
        """Check that the store of checkpoints is there for what is not at hand without it."""
        if isinstance(operation, LoadState):
            row = await self._checkpoint(parse_checkpoint_uri(operation.path))
            if row is not None and self._c.store.is_at_hand(row.id):
                return
        await self._c.store.check_reachable()

    async def _checkpoint(self, uri: CheckpointUri) -> Checkpoint | None:
        async with self._c.db.look_up() as session:
            return await queries_checkpoints.named(session, uri.run_id, uri.target, uri.name)

    async def refuse(self, run: Run, submission: Submission, error: str, error_class: str) -> str:
        """Give an operation that cannot be served its place and an error as its outcome; returns its id.

        For a client that has counted its sequence id and asks for the outcome: those behind do not wait for it.

        Raises:
            Conflict: the run is inactive, or the id or sequence id was used for a different request.
        """
        if run.status != RunStatus.ACTIVE:
            raise Conflict(
                f"run {run.id} is INACTIVE: it was deactivated and takes no more operations", reason="RUN_INACTIVE"
            )
        assert submission.seq is not None
        actor = await self._c.scheduler.actor(run.id)
        async with actor.accepting:
            accepted = await self._c.journal.refuse(actor.run, submission, error, error_class)
            await self._skip(actor, submission.seq)
        return accepted.row.id

    async def skip(self, run: Run, seq: int) -> None:
        """Nothing is to be expected at ``seq``: its call was refused. Those behind it do not wait for it.

        A corrected call may still take the place, as long as none behind it has been accepted.
        """
        if run.status != RunStatus.ACTIVE:
            return
        actor = await self._c.scheduler.actor(run.id)
        async with actor.accepting:
            next_seq = actor.run.next_seq
            known = self._skipped.get(run.id, set())
            if next_seq <= seq < next_seq + _SKIPPED_AHEAD and (actor.run.epoch, seq) not in known:
                await self._c.journal.skip(actor.run, seq)
                await self._skip(actor, seq)

    def remember_refusal(self, run_id: str, seq: int, digest: str, error: SelfloopError) -> None:
        self._refused[run_id, seq] = Refusal(digest, error)
        if len(self._refused) > _REFUSALS_COUNT:
            self._refused.popitem(last=False)

    def refusal(self, run_id: str, seq: int) -> Refusal | None:
        """The last refusal of a call for this place, if it was not long ago."""
        return self._refused.get((run_id, seq))

    async def _skip(self, actor: RunActor, seq: int) -> None:
        """Go on without ``seq``, of which the journal knows."""
        self._skipped.setdefault(actor.run.id, set()).add((actor.run.epoch, seq))
        await self._pass_skipped(actor)

    async def _pass_skipped(self, actor: RunActor) -> None:
        """Go past places that were skipped, once something waits behind them."""
        run = actor.run
        skipped = self._skipped.get(run.id, set())
        while (run.epoch, run.next_seq) in skipped and (waiting := actor.queue.out_of_order_seqs()):
            await self._c.journal.skip_gap(run, first_missing(run.next_seq + 1, waiting))
            actor.look_again()
        skipped -= {(epoch, seq) for epoch, seq in skipped if epoch < run.epoch or seq < run.next_seq}

    async def wait(self, run_id: str, operation_id: str, timeout_s: float) -> Outcome | Pending:
        """The operation's outcome, as soon as there is one within ``timeout_s``.

        Raises:
            NotFound: no such operation, or its result has expired.
        """
        key = (run_id, operation_id)
        if key not in self._awaited:
            return self._awaited.recent(key) or await self._stored(run_id, operation_id)
        outcome = await self._awaited.wait(key, timeout_s)
        if outcome is not None:
            return outcome
        actor = self._c.scheduler.known(run_id)
        return Pending(actor.waiting_for(operation_id) if actor else "queued")

    async def cancel(self, run_id: str, operation_id: str) -> None:
        """Take a queued operation back. Raises :class:`Conflict` once it runs or has ended."""
        row = await self._row(run_id, operation_id)
        actor = self._c.scheduler.known(run_id)
        if row.state == OperationState.CANCELLED:
            return
        if row.state != OperationState.QUEUED or actor is None or not actor.remove(operation_id):
            raise Conflict(f"operation {operation_id} is already running or has ended")
        try:
            await self._c.outcomes.fail(cancelled(row, "cancelled by request"))
        except (*TRANSIENT_ERRORS, Unavailable):
            actor.push(row)
            raise
        async with actor.accepting:
            await self._skip(actor, row.seq)

    async def check_loadable(
        self, run: Run, path: str, *, with_optimizer: bool, granted_team_id: str | None = None
    ) -> None:
        """Check that ``path`` names a checkpoint this run may load, stored or still being saved by it.

        Args:
            granted_team_id: another team, whose checkpoints the caller may read.

        Raises:
            BadRequest: malformed, or of another base model.
            NotFound: there is no such checkpoint.
        """
        uri = parse_checkpoint_uri(path)
        if with_optimizer and uri.target is not CheckpointTarget.TRAINER:
            raise BadRequest("path", "a trainer checkpoint (.../weights/<name>): a sampler's has no optimizer state")
        row = await self._checkpoint(uri)
        if row is not None and row.may_be_read_by(run.team_id, granted_team_id):
            await self._c.catalogue.same_model(row.base_model, run.base_model, "path")
            return
        kind = SaveState if uri.target is CheckpointTarget.TRAINER else SaveWeightsForSampler
        actor = self._c.scheduler.known(run.id)
        if uri.run_id != run.id or actor is None or not actor.saves_named(uri.name, kind):
            raise NotFound("checkpoint", path)

    async def check_name_is_free(self, run: Run, name: str) -> None:
        """Check that the run has no trainer checkpoint of that name, stored or still being saved.

        Raises:
            BadRequest: it has one.
        """
        async with self._c.db.look_up() as session:
            row = await queries_checkpoints.named(session, run.id, CheckpointTarget.TRAINER, name)
        actor = self._c.scheduler.known(run.id)
        if row is not None or (actor is not None and actor.saves_named(name, SaveState)):
            raise BadRequest("path", f"a name that is free, or overwrite: this run has a checkpoint {name!r}")

    async def _row(self, run_id: str, operation_id: str) -> OperationRow:
        row = await self._c.journal.get(run_id, operation_id)
        if row is None:
            raise NotFound("operation", operation_id)
        return row

    async def _stored(self, run_id: str, operation_id: str) -> Outcome:
        row = await self._row(run_id, operation_id)
        if row.state != OperationState.DONE:
            return Outcome(None, row.error, row.error_class)
        try:
            result = await self._c.journal.result(row)
        except OperationFailed as error:
            return Outcome(None, str(error), error.error_class)
        if result is None:
            raise NotFound("operation", operation_id, f"its result was kept for {RESULT_KEPT_S:.0f} s")
        return Outcome(result)

    async def _purge(self) -> None:
        ages = Ages(RESULT_KEPT_S)
        while True:
            await asyncio.sleep(_PURGE_EVERY_S)
            with tried("purge of results"):
                await self._c.journal.purge(ages.old())


async def _encoded(operation: Operation) -> bytes:
    """As bytes; what is large beside the event loop."""
    data = operation.data if isinstance(operation, Forward | ForwardBackward) else []
    if sum(len(datum.tokens.data) for datum in data) > _LARGE_BYTES:
        return await asyncio.to_thread(encoded, operation)
    return encoded(operation)


def checked_operation_id(key: str) -> str:
    """An idempotency key that may name an operation (and a file). Raises :class:`BadRequest`."""
    if not 1 <= len(key) <= 128 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in key):
        raise BadRequest("Idempotency-Key", "1-128 characters of A-Z a-z 0-9 - _")
    return key
