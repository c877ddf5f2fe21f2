"""Rows of the journal."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Result, Row, Update, delete, func, insert, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.portable import insert_or_update
from selfloop.storage.db.tables import OperationRow, RunRow, SkippedRow
from selfloop.types.status import RunStatus


class Purged(NamedTuple):
    """How many rows were changed, and the blobs that they had."""

    num_rows: int
    blob_keys: list[str]


def add(connection: Connection, row: OperationRow, next_seq: int) -> None:
    """Store an accepted operation, and how far its run's order has come with it.

    Raises ``IntegrityError`` when the run has an operation of that id or at that place.
    """
    columns = OperationRow.__table__.columns.keys()
    connection.execute(insert(OperationRow), {name: getattr(row, name) for name in columns})
    connection.execute(update(RunRow).where(RunRow.id == row.run_id).values(epoch=row.epoch, next_seq=next_seq))


async def get(session: AsyncSession, run_id: str, operation_id: str) -> OperationRow | None:
    return await session.get(OperationRow, (run_id, operation_id))


async def at_seq(session: AsyncSession, run_id: str, epoch: int, seq: int) -> OperationRow | None:
    return await session.scalar(select(OperationRow).filter_by(run_id=run_id, epoch=epoch, seq=seq))


async def in_state(session: AsyncSession, state: str, run_id: str | None = None) -> Sequence[OperationRow]:
    """Operations in ``state`` (of one run), in execution order."""
    query = select(OperationRow).where(OperationRow.state == state)
    if run_id is not None:
        query = query.where(OperationRow.run_id == run_id)
    ordered = query.order_by(OperationRow.run_id, OperationRow.epoch, OperationRow.seq)
    return (await session.scalars(ordered)).all()


async def note_attempts(session: AsyncSession, row: OperationRow, num_attempts: int) -> None:
    at_row = update(OperationRow).where(OperationRow.run_id == row.run_id, OperationRow.id == row.id)
    await session.execute(at_row.values(num_attempts=num_attempts))


def skip(connection: Connection, run_id: str, epoch: int, seq: int) -> None:
    """Note that nothing is to be expected at this place; once more is fine."""
    place = {"run_id": run_id, "epoch": epoch, "seq": seq}
    connection.execute(insert_or_update(connection, SkippedRow).values(place).on_conflict_do_nothing())


async def skipped(session: AsyncSession) -> Sequence[tuple[str, int, int]]:
    """Places (run, epoch, seq) ahead of a run's order that nothing is to be expected at.

    They were noted so, or their operation was cancelled or refused before its turn.
    """
    noted = select(SkippedRow.run_id, SkippedRow.epoch, SkippedRow.seq).join(RunRow).where(~_passed())
    ahead = RunRow.epoch == OperationRow.epoch, RunRow.next_seq <= OperationRow.seq, RunRow.status == RunStatus.ACTIVE
    completed = select(OperationRow.run_id, OperationRow.epoch, OperationRow.seq).join(RunRow)
    completed = completed.where(*ahead, OperationRow.state != "queued")
    return [(row[0], row[1], row[2]) for row in await session.execute(noted.union(completed))]


async def forget_skipped(session: AsyncSession) -> None:
    """Remove the notes that their runs have gone past, or have left behind by their end."""
    passed = select(RunRow.id).where(RunRow.id == SkippedRow.run_id, _passed())
    await session.execute(delete(SkippedRow).where(passed.exists()))


def _passed() -> ColumnElement[bool]:
    is_behind = tuple_(SkippedRow.epoch, SkippedRow.seq) < tuple_(RunRow.epoch, RunRow.next_seq)
    return or_(is_behind, RunRow.status != RunStatus.ACTIVE)


async def blob_keys(session: AsyncSession, run_id: str) -> set[str]:
    """Keys of every payload and result of a run that lies in a blob."""
    query = select(OperationRow.payload_key, OperationRow.result_key).where(OperationRow.run_id == run_id)
    return {key for row in await session.execute(query) for key in row if key is not None}


async def done_after(
    session: AsyncSession, run_id: str, position: tuple[int, int], kinds: frozenset[str]
) -> Sequence[OperationRow]:
    """Finished operations of ``kinds`` after ``position`` (epoch, seq), in execution order."""
    rows = await session.scalars(
        select(OperationRow)
        .where(
            OperationRow.run_id == run_id,
            OperationRow.state == "done",
            OperationRow.kind.in_(kinds),
            tuple_(OperationRow.epoch, OperationRow.seq) > position,
        )
        .order_by(OperationRow.epoch, OperationRow.seq)
    )
    return rows.all()


async def num_done_after(session: AsyncSession, run_id: str, position: tuple[int, int], kinds: frozenset[str]) -> int:
    """How many operations of ``kinds`` after ``position`` have finished."""
    found = await session.scalar(
        select(func.count())
        .select_from(OperationRow)
        .where(
            OperationRow.run_id == run_id,
            OperationRow.state == "done",
            OperationRow.kind.in_(kinds),
            tuple_(OperationRow.epoch, OperationRow.seq) > position,
        )
    )
    return found or 0


def finishing(
    row: OperationRow,
    *,
    state: str,
    at: float,
    result: bytes | None = None,
    result_key: str | None = None,
    result_digest: str | None = None,
    error: str | None = None,
    error_class: str | None = None,
) -> Update:
    """The statement that stores the outcome of a queued operation; it changes no row when it was completed before."""
    queued = OperationRow.run_id == row.run_id, OperationRow.id == row.id, OperationRow.state == "queued"
    return (
        update(OperationRow)
        .where(*queued)
        .values(
            state=state,
            finished_at=at,
            result=result,
            result_key=result_key,
            result_digest=result_digest,
            error=error,
            error_class=error_class,
        )
    )


def is_changed(result: Result[Any]) -> bool:
    """Whether the statement changed its one row."""
    return getattr(result, "rowcount", 0) == 1


async def covered_payloads(session: AsyncSession, run_id: str, position: tuple[int, int]) -> Sequence[OperationRow]:
    """Settled operations up to ``position`` whose payload is still kept."""
    rows = await session.scalars(
        select(OperationRow).where(
            OperationRow.run_id == run_id,
            OperationRow.state != "queued",
            tuple_(OperationRow.epoch, OperationRow.seq) <= position,
            or_(OperationRow.payload.is_not(None), OperationRow.payload_key.is_not(None)),
        )
    )
    return rows.all()


async def drop_payloads(session: AsyncSession, run_id: str, ids: Sequence[str]) -> None:
    await session.execute(
        update(OperationRow)
        .where(OperationRow.run_id == run_id, OperationRow.id.in_(ids))
        .values(payload=None, payload_key=None)
    )


async def purge_rows(session: AsyncSession, before: float, limit: int) -> Purged:
    """Remove operations finished ``before`` that recovery no longer needs: their payload is gone already."""
    gone = OperationRow.payload.is_(None), OperationRow.payload_key.is_(None)
    found = await _finished(session, before, limit, *gone)
    await session.execute(delete(OperationRow).where(_places(found)))
    return _purged(found)


async def purge_results(session: AsyncSession, before: float, limit: int) -> Purged:
    """Let go of the results of operations finished ``before``."""
    kept = or_(OperationRow.result.is_not(None), OperationRow.result_key.is_not(None))
    found = await _finished(session, before, limit, kept)
    await session.execute(update(OperationRow).where(_places(found)).values(result=None, result_key=None))
    return _purged(found)


async def _finished(
    session: AsyncSession, before: float, limit: int, *conditions: ColumnElement[bool]
) -> Sequence[Row[str, str, str | None]]:
    query = select(OperationRow.run_id, OperationRow.id, OperationRow.result_key)
    return (await session.execute(query.where(OperationRow.finished_at < before, *conditions).limit(limit))).all()


def _places(found: Sequence[Row[str, str, str | None]]) -> ColumnElement[bool]:
    return tuple_(OperationRow.run_id, OperationRow.id).in_([(row[0], row[1]) for row in found])


def _purged(found: Sequence[Row[str, str, str | None]]) -> Purged:
    return Purged(len(found), [key for _run_id, _id, key in found if key is not None])
