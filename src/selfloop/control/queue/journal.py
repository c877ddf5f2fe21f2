"""The durable operation queue on disk: what was accepted, in which order, and how it ended."""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, Update
from sqlalchemy.exc import IntegrityError

from selfloop.control.queue.durable_bytes import BytesLost, DurableBytes, StoredBytes
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_operations, queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.errors import Conflict, OperationFailed
from selfloop.types.logline import current
from selfloop.types.operation import CHANGES_STATE, Operation, operation_decoder, traits_of
from selfloop.types.status import OperationState

log = logging.getLogger(__name__)

END_OF_TIME = (2**62, 2**62)
"""A position after every operation."""


@dataclass(frozen=True, slots=True)
class Submission:
    """Whose place an operation takes, as a dialect gives it.

    Args:
        id: the client's idempotency key, which becomes the operation's id.
        seq: the client's sequence id, or None to take the next free place.
        fingerprint: digest of the request as the client sent it, to distinguish a retry from a different request.
    """

    id: str
    kind: str
    seq: int | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """Where a submission landed; ``is_new`` is False for a retry of one that was accepted before."""

    row: OperationRow
    is_new: bool


class Failure(NamedTuple):
    """An operation that ends without a result, and its cause."""

    row: OperationRow
    error: str
    error_class: str
    state: OperationState = OperationState.ERROR


class Journal:
    """Order and durability. One instance a data directory; calls about one run are serialised by the caller."""

    def __init__(self, db: Database, blobs: LocalBlobs) -> None:
        self._db = db
        self._bytes = DurableBytes(db, blobs, "journal")

    async def accept(
        self, run: RunRow, submission: Submission, payload: bytes, out_of_order: Collection[int]
    ) -> Accepted:
        """Give the submission its place in the run's order and make it durable.

        Args:
            run: the live row; its ``epoch`` and ``next_seq`` go on as this operation arrives.
            payload: of :func:`encoded`.
            out_of_order: sequence ids of the epoch, at or above ``run.next_seq``, that are here already.

        Raises:
            Conflict: the id or the sequence id was used for a different request, or the place has passed.
        """
        epoch, next_seq = run.epoch, run.next_seq
        if traits_of(submission.kind).starts_epoch and submission.seq == 1 and next_seq > 1:
            if (known := await self.get(run.id, submission.id)) is not None:
                return Accepted(_same_request(known, submission, "Idempotency-Key"), is_new=False)
            # A client that attaches starts counting anew; what is queued before it still runs first.
            epoch, next_seq, out_of_order = epoch + 1, 1, ()
        seq = max([next_seq - 1, *out_of_order]) + 1 if submission.seq is None else submission.seq
        row = _operation_row(run.id, epoch, seq, submission, OperationState.QUEUED)
        if seq < next_seq:
            return Accepted(await self._known(row, submission, next_seq), is_new=False)
        row.key_id = current().key_id or None
        # Named by its content too: a different request under a used id must not touch the payload that is there.
        name = f"{submission.id}-{submission.fingerprint[:16]}.op"
        stored = await self._bytes.put(run.id, name, payload_place(row), payload)
        row.payload, row.payload_key, row.payload_digest = stored
        if seq == next_seq:
            next_seq = first_missing(seq + 1, out_of_order)
        try:
            await self._db.write_grouped(lambda connection: queries_operations.add(connection, row, next_seq))
        except IntegrityError:
            return Accepted(await self._known(row, submission, next_seq), is_new=False)
        run.epoch, run.next_seq = epoch, next_seq
        return Accepted(row, is_new=True)

    async def _known(self, row: OperationRow, submission: Submission, next_seq: int) -> OperationRow:
        """The operation that holds the id or the place of ``row``, if it is the same request."""
        async with self._db.look_up() as session:
            by_id = await queries_operations.get(session, row.run_id, row.id)
            by_seq = await queries_operations.at_seq(session, row.run_id, row.epoch, row.seq)
        if by_id is not None:
            return _same_request(by_id, submission, "Idempotency-Key")
        if by_seq is not None:
            return _same_request(by_seq, submission, "seq_id")
        raise Conflict(f"seq_id {row.seq} came too late: the run has gone on to seq_id {next_seq} without it")

    async def refuse(self, run: RunRow, submission: Submission, error: str, error_class: str) -> Accepted:
        """Note at the submission's place that it was refused; the run's order goes on by :meth:`skip_gap`.

        Raises:
            Conflict: the id or the sequence id was used for a different request.
        """
        assert submission.seq is not None
        row = _operation_row(run.id, run.epoch, submission.seq, submission, OperationState.ERROR)
        row.error, row.error_class, row.finished_at = error, error_class, row.created_at
        try:
            async with self._db.write() as session:
                session.add(row)
                await session.flush()
        except IntegrityError:
            return Accepted(await self._known(row, submission, run.next_seq), is_new=False)
        return Accepted(row, is_new=True)

    async def skip(self, run: RunRow, seq: int) -> None:
        """Note that nothing is to be expected at ``seq``, until the run has gone past it."""
        run_id, epoch = run.id, run.epoch
        await self._db.write_grouped(lambda connection: queries_operations.skip(connection, run_id, epoch, seq))

    async def skipped(self) -> Sequence[tuple[str, int, int]]:
        """Places (run, epoch, seq) ahead of a run's order that nothing is to be expected at."""
        async with self._db.read() as session:
            return await queries_operations.skipped(session)

    async def note_attempts(self, row: OperationRow, num_attempts: int) -> None:
        """Make durable how many workers have died at an operation."""
        async with self._db.write() as session:
            await queries_operations.note_attempts(session, row, num_attempts)
        row.num_attempts = num_attempts

    async def skip_gap(self, run: RunRow, next_seq: int) -> None:
        """Stop waiting for the sequence ids below ``next_seq``."""
        async with self._db.write() as session:
            await queries_resources.update_run(session, run.id, next_seq=next_seq)
        run.next_seq = next_seq

    async def payload(self, row: OperationRow) -> bytes:
        """What was accepted, bit for bit.

        Raises:
            OperationFailed: it is gone, or is not what was accepted (``RecoveryFailed``); the operation is named.
        """
        inline = row.payload
        if inline is None and row.payload_key is None:
            # Let go of by the queue that the row waited in.
            stored = await self.get(row.run_id, row.id)
            inline = None if stored is None else stored.payload
            if inline is None:
                raise _unreadable(row, "its row has it no more")
        stored = StoredBytes(inline, row.payload_key, row.payload_digest)
        try:
            return await self._bytes.get(stored, payload_place(row))
        except BytesLost as error:
            raise _unreadable(row, str(error)) from error

    async def operation(self, row: OperationRow) -> Operation:
        """What was accepted. Raises as :meth:`payload`."""
        return decoded(await self.payload(row))

    async def store_result(self, row: OperationRow, result: bytes) -> StoredBytes:
        """Put a large result aside."""
        return await self._bytes.put_anyhow(row.run_id, f"{row.id}.result", result_place(row), result)

    async def clear_leftovers(self) -> None:
        """Remove files that a crash left without a row."""
        await self._bytes.clear_leftovers(queries_operations.blob_keys)

    async def result(self, row: OperationRow) -> bytes | None:
        """The stored result, or None once it has expired.

        Raises:
            OperationFailed: it is not what was stored, or its file is gone (``ResultLost``).
        """
        if row.result_key is None and row.result is None:
            return None
        stored = StoredBytes(row.result, row.result_key, row.result_digest)
        try:
            return await self._bytes.get(stored, result_place(row))
        except BytesLost as error:
            raise _result_lost(row, str(error)) from error

    async def fail(self, failures: Sequence[Failure]) -> list[Failure]:
        """Complete queued operations without a result, all at once; returns those that had no outcome before."""

        def store(connection: Connection) -> list[Failure]:
            return [
                failure for failure in failures if queries_operations.is_changed(connection.execute(_failing(failure)))
            ]

        return await self._db.write_grouped(store)

    async def get(self, run_id: str, operation_id: str) -> OperationRow | None:
        async with self._db.look_up() as session:
            return await queries_operations.get(session, run_id, operation_id)

    async def queued(self) -> Sequence[OperationRow]:
        """Everything that was accepted and has no outcome yet, in execution order."""
        async with self._db.read() as session:
            return await queries_operations.in_state(session, OperationState.QUEUED)

    async def to_replay(self, run: RunRow, position: tuple[int, int]) -> Sequence[OperationRow]:
        """What must be done again on top of the state at ``position`` to get back the run's."""
        async with self._db.read() as session:
            return await queries_operations.done_after(session, run.id, position, CHANGES_STATE)

    async def forget_payloads(self, run_id: str, position: tuple[int, int]) -> None:
        """Drop the payloads that a snapshot at ``position`` makes superfluous."""
        async with self._db.write() as session:
            rows = await queries_operations.covered_payloads(session, run_id, position)
            keys = [row.payload_key for row in rows]
            await queries_operations.drop_payloads(session, run_id, [row.id for row in rows])
        await self._bytes.delete(keys)

    async def purge(self, before: float) -> None:
        """Delete results finished ``before``, and rows that recovery no longer needs."""
        await self._bytes.purge(queries_operations.purge_rows, before)
        await self._bytes.purge(queries_operations.purge_results, before)
        async with self._db.write() as session:
            await queries_operations.forget_skipped(session)


def encoded(operation: Operation) -> bytes:
    """An operation as it is stored, and as a worker takes it."""
    return msgspec.msgpack.encode(operation)


def decoded(payload: bytes) -> Operation:
    """Of :func:`encoded`."""
    return operation_decoder.decode(payload)


def payload_place(row: OperationRow) -> str:
    """What a payload belongs to: the operation at its place in the run's order."""
    return f"{row.run_id}\0{row.id}\0{row.epoch}\0{row.seq}\0{row.kind}\0"


def result_place(row: OperationRow) -> str:
    """What a result belongs to: the operation."""
    return f"{row.run_id}\0{row.id}\0"


def _operation_row(run_id: str, epoch: int, seq: int, submission: Submission, state: OperationState) -> OperationRow:
    return OperationRow(
        run_id=run_id,
        id=submission.id,
        epoch=epoch,
        seq=seq,
        kind=submission.kind,
        fingerprint=submission.fingerprint,
        state=state,
        created_at=time.time(),
    )


def _unreadable(row: OperationRow, how: str) -> OperationFailed:
    return OperationFailed(f"{row.kind} (seq_id {row.seq}, operation {row.id}) cannot be read: {how}", "RecoveryFailed")


def _result_lost(row: OperationRow, how: str) -> OperationFailed:
    return OperationFailed(
        f"{row.kind} (seq_id {row.seq}) was carried out, and its result cannot be read: {how}", "ResultLost"
    )


def cancelled(row: OperationRow, why: str) -> Failure:
    return Failure(row, why, "Cancelled", OperationState.CANCELLED)


def _failing(failure: Failure) -> Update:
    row, error, error_class, state = failure
    return queries_operations.finishing(row, state=state, at=time.time(), error=error, error_class=error_class)


def _same_request(row: OperationRow, submission: Submission, what: str) -> OperationRow:
    if row.fingerprint != submission.fingerprint:
        value = submission.id if what == "Idempotency-Key" else submission.seq
        raise Conflict(f"{what} {value} was already used for a different request ({row.kind})")
    return row


def first_missing(start: int, arrived: Collection[int]) -> int:
    """The lowest number from ``start`` on that is not in ``arrived``."""
    while start in arrived:
        start += 1
    return start
