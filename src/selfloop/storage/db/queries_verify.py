"""Rows that know of files or carry digests, a page at a time."""

from collections.abc import Sequence

from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import (
    CheckpointRow,
    ModelRow,
    OperationRow,
    PinnedCheckpointRow,
    QueuedSampleRow,
)

_PAGE = 500


async def operations(session: AsyncSession, after: OperationRow | None) -> Sequence[OperationRow]:
    """The next ones behind ``after``, by run and id."""
    query = select(OperationRow).order_by(OperationRow.run_id, OperationRow.id).limit(_PAGE)
    if after is not None:
        query = query.where(tuple_(OperationRow.run_id, OperationRow.id) > (after.run_id, after.id))
    return (await session.scalars(query)).all()


async def samples(session: AsyncSession, after: QueuedSampleRow | None) -> Sequence[QueuedSampleRow]:
    """The next ones behind ``after``, by sampler and id."""
    query = select(QueuedSampleRow).order_by(QueuedSampleRow.sampler_id, QueuedSampleRow.id).limit(_PAGE)
    if after is not None:
        query = query.where(tuple_(QueuedSampleRow.sampler_id, QueuedSampleRow.id) > (after.sampler_id, after.id))
    return (await session.scalars(query)).all()


async def checkpoint_ids(session: AsyncSession) -> Sequence[str]:
    return (await session.scalars(select(CheckpointRow.id).order_by(CheckpointRow.id))).all()


async def held(session: AsyncSession) -> Sequence[PinnedCheckpointRow]:
    return (await session.scalars(select(PinnedCheckpointRow))).all()


async def models(session: AsyncSession) -> Sequence[ModelRow]:
    return (await session.scalars(select(ModelRow))).all()
