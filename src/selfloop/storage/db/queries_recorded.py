"""Rows of recorded samples."""

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Connection, delete, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import RecordedSampleRow

Key = tuple[str, str]
"""Sampler and request."""

# Rows named in one statement: databases bound the number of its parameters.
_AT_ONCE = 400


def put(connection: Connection, row: RecordedSampleRow) -> None:
    """Add the row, in place of one with its key."""
    columns = RecordedSampleRow.__table__.columns.keys()
    connection.execute(delete(RecordedSampleRow).where(_is([(row.sampler_id, row.request)])))
    connection.execute(insert(RecordedSampleRow), {name: getattr(row, name) for name in columns})


async def valid(session: AsyncSession, keys: Collection[Key], now: float) -> Sequence[RecordedSampleRow]:
    """The rows of those keys that have not expired."""
    rows: list[RecordedSampleRow] = []
    for part in _parts(keys):
        query = select(RecordedSampleRow).where(_is(part), RecordedSampleRow.expires_at > now)
        rows += (await session.scalars(query)).all()
    return rows


def renew(connection: Connection, keys: Collection[Key], expires_at: float) -> None:
    for part in _parts(keys):
        connection.execute(update(RecordedSampleRow).where(_is(part)).values(expires_at=expires_at))


async def remove_expired(session: AsyncSession, now: float) -> None:
    await session.execute(delete(RecordedSampleRow).where(RecordedSampleRow.expires_at <= now))


def _is(keys: Sequence[Key]) -> ColumnElement[bool]:
    return tuple_(RecordedSampleRow.sampler_id, RecordedSampleRow.request).in_(list(keys))


def _parts(keys: Collection[Key]) -> list[list[Key]]:
    listed = list(keys)
    return [listed[i : i + _AT_ONCE] for i in range(0, len(listed), _AT_ONCE)]
