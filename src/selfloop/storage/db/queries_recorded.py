"""Rows of recorded samples."""

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.queries_operations import Purged
from selfloop.storage.db.tables import RecordedSampleRow, SamplerRow
from selfloop.types.status import SamplerStatus

Key = tuple[str, str]
"""Sampler and request."""

# Rows named in one statement: databases bound the number of its parameters.
_AT_ONCE = 400


def put(connection: Connection, row: RecordedSampleRow) -> str | None:
    """Add the row, in place of one with its key; returns the blob that was that one's alone."""
    columns = RecordedSampleRow.__table__.columns.keys()
    before = _is([(row.sampler_id, row.request)])
    key = connection.scalar(select(RecordedSampleRow.routes_key).where(before))
    connection.execute(delete(RecordedSampleRow).where(before))
    connection.execute(insert(RecordedSampleRow), {name: getattr(row, name) for name in columns})
    return key


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


async def remove_unusable(session: AsyncSession, now: float, limit: int) -> Purged:
    """Forget at most ``limit`` of what has expired, or is of a sampler that has ended."""
    table = RecordedSampleRow
    ended = select(SamplerRow.id).where(SamplerRow.status == SamplerStatus.INACTIVE)
    query = select(table.sampler_id, table.request, table.routes_key)
    query = query.where(or_(table.expires_at <= now, table.sampler_id.in_(ended))).limit(limit)
    found = (await session.execute(query)).all()
    for part in _parts([(row[0], row[1]) for row in found]):
        await session.execute(delete(table).where(_is(part)))
    return Purged(len(found), [key for _sampler, _request, key in found if key is not None])


async def blob_keys(session: AsyncSession, sampler_id: str) -> set[str]:
    """Keys of the routes of a sampler that lie in blobs."""
    query = select(RecordedSampleRow.routes_key).filter_by(sampler_id=sampler_id)
    return {key for key in await session.scalars(query) if key is not None}


def _is(keys: Sequence[Key]) -> ColumnElement[bool]:
    return tuple_(RecordedSampleRow.sampler_id, RecordedSampleRow.request).in_(list(keys))


def _parts(keys: Collection[Key]) -> list[list[Key]]:
    listed = list(keys)
    return [listed[i : i + _AT_ONCE] for i in range(0, len(listed), _AT_ONCE)]
