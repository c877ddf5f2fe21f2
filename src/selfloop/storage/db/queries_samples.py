"""Rows of queued samples."""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.queries_operations import Purged
from selfloop.storage.db.tables import QueuedSampleRow


def add(connection: Connection, row: QueuedSampleRow) -> None:
    """Raises ``IntegrityError`` when the sampler has a sample of that id."""
    columns = QueuedSampleRow.__table__.columns.keys()
    connection.execute(insert(QueuedSampleRow), {name: getattr(row, name) for name in columns})


def finish(
    connection: Connection,
    sampler_id: str,
    id: str,
    *,
    state: str,
    at: float,
    result: bytes | None = None,
    result_key: str | None = None,
    result_digest: str | None = None,
    error: str | None = None,
    error_class: str | None = None,
) -> bool:
    """Store the outcome of a queued sample; False when it has one."""
    changed = connection.execute(
        update(QueuedSampleRow)
        .where(QueuedSampleRow.sampler_id == sampler_id, QueuedSampleRow.id == id, QueuedSampleRow.state == "queued")
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
    return changed.rowcount == 1


async def get(session: AsyncSession, sampler_id: str, id: str) -> QueuedSampleRow | None:
    return await session.get(QueuedSampleRow, (sampler_id, id))


async def queued(session: AsyncSession) -> Sequence[tuple[str, str]]:
    """``(sampler_id, id)`` of everything without an outcome, the oldest first."""
    rows = await session.execute(
        select(QueuedSampleRow.sampler_id, QueuedSampleRow.id)
        .where(QueuedSampleRow.state == "queued")
        .order_by(QueuedSampleRow.created_at)
    )
    return [(row[0], row[1]) for row in rows]


async def blob_keys(session: AsyncSession, sampler_id: str) -> set[str]:
    """Keys of every payload and result of a sampler that lies in a blob."""
    query = select(QueuedSampleRow.payload_key, QueuedSampleRow.result_key).filter_by(sampler_id=sampler_id)
    return {key for row in await session.execute(query) for key in row if key is not None}


async def remove_finished(session: AsyncSession, before: float, limit: int) -> Purged:
    """Forget at most ``limit`` of what finished ``before``."""
    table = QueuedSampleRow
    query = select(table.sampler_id, table.id, table.payload_key, table.result_key)
    found = (await session.execute(query.where(table.finished_at < before).limit(limit))).all()
    places = tuple_(table.sampler_id, table.id).in_([(row[0], row[1]) for row in found])
    await session.execute(delete(table).where(places))
    return Purged(len(found), [key for row in found for key in row[2:] if key is not None])
