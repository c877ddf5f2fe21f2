"""What is verified: rows that know of files or carry digests, a page at a time, and the file of SQLite itself."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import (
    CheckpointRow,
    ModelRow,
    OperationRow,
    PinnedCheckpointRow,
    QueuedSampleRow,
    RecordedSampleRow,
)

_PAGE = 500
_MAX_COMPLAINTS = 20


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


async def recorded(session: AsyncSession, after: RecordedSampleRow | None) -> Sequence[RecordedSampleRow]:
    """The next ones behind ``after``, by sampler and request."""
    table = RecordedSampleRow
    query = select(table).order_by(table.sampler_id, table.request).limit(_PAGE)
    if after is not None:
        query = query.where(tuple_(table.sampler_id, table.request) > (after.sampler_id, after.request))
    return (await session.scalars(query)).all()


async def checkpoint_ids(session: AsyncSession) -> Sequence[str]:
    return (await session.scalars(select(CheckpointRow.id).order_by(CheckpointRow.id))).all()


async def held(session: AsyncSession) -> Sequence[PinnedCheckpointRow]:
    return (await session.scalars(select(PinnedCheckpointRow))).all()


async def models(session: AsyncSession) -> Sequence[ModelRow]:
    return (await session.scalars(select(ModelRow))).all()


def complaints(file: Path) -> list[str]:
    """What is wrong with the structure of a database; nothing for a sound one. Works beside a running server."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("PRAGMA cell_size_check = ON")
            found = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_MAX_COMPLAINTS})")]
            orphans = connection.execute("PRAGMA foreign_key_check").fetchmany(_MAX_COMPLAINTS)
    except sqlite3.Error as error:
        return [str(error)]
    lost = [f"row {row} of {table} refers to a row of {parent} that is gone" for table, row, parent, _ in orphans]
    return [line for line in found if line != "ok"] + lost
