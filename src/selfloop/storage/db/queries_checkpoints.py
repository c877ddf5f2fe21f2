"""Rows of checkpoints. One whose time has come is as good as deleted, also before its files are."""

import time
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Select, delete, exists, func, or_, select
from sqlalchemy import update as update_rows
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.keyset import Cut, Part, part
from selfloop.storage.db.tables import CheckpointRow, RunRow, view, views
from selfloop.types.resources import Checkpoint
from selfloop.types.status import CheckpointTarget


def _not_expired() -> ColumnElement[bool]:
    return or_(CheckpointRow.expires_at.is_(None), CheckpointRow.expires_at > time.time())


async def get(session: AsyncSession, id: str) -> Checkpoint | None:
    return view(await session.scalar(select(CheckpointRow).where(CheckpointRow.id == id, _not_expired())))


async def named_by_id(session: AsyncSession, ids: Collection[str]) -> dict[str, Checkpoint]:
    """Those of the ids that are there."""
    rows = await session.scalars(select(CheckpointRow).where(CheckpointRow.id.in_(list(ids)), _not_expired()))
    return {row.id: row.view() for row in rows}


async def stored(session: AsyncSession, id: str) -> Checkpoint | None:
    """The row whose files are there, expired or not."""
    return view(await session.get(CheckpointRow, id))


async def named(session: AsyncSession, run_id: str, target: str, name: str) -> Checkpoint | None:
    query = select(CheckpointRow).filter_by(run_id=run_id, target=target, name=name)
    return view(await session.scalar(query.where(_not_expired())))


async def holder_of_name(session: AsyncSession, run_id: str, target: str, name: str) -> Checkpoint | None:
    """The row that holds a name, expired or not."""
    return view(await session.scalar(select(CheckpointRow).filter_by(run_id=run_id, target=target, name=name)))


async def matching(
    session: AsyncSession,
    team_id: str,
    *,
    run_id: str | None = None,
    base_model: str | None = None,
    key_id: str | None = None,
) -> Sequence[Checkpoint]:
    """A team's checkpoints (of the runs of one key), newest first; see :func:`matching_part`."""
    query = _matching(team_id, run_id, base_model, key_id)
    return views(await session.scalars(query.order_by(CheckpointRow.created_at.desc(), CheckpointRow.id.desc())))


async def matching_part(
    session: AsyncSession,
    cut: Cut,
    team_id: str,
    *,
    run_id: str | None = None,
    base_model: str | None = None,
    key_id: str | None = None,
) -> Part[Checkpoint]:
    """A team's checkpoints (of the runs of one key).

    Not the snapshots that belong to one sampler, nor what was saved only to be downloaded.
    """
    return (await part(session, _matching(team_id, run_id, base_model, key_id), CheckpointRow, cut)).map(
        lambda row: row.view()
    )


def _matching(team_id: str, run_id: str | None, base_model: str | None, key_id: str | None) -> "Select[CheckpointRow]":
    filters = {"run_id": run_id, "base_model": base_model}
    query = select(CheckpointRow).filter_by(
        team_id=team_id, sampler_id=None, **{k: v for k, v in filters.items() if v is not None}
    )
    query = query.where(CheckpointRow.target != CheckpointTarget.EXTERNAL, _not_expired())
    if key_id is not None:
        # Asked of each row: the list's own order is not left for the runs' one.
        query = query.where(exists().where(RunRow.id == CheckpointRow.run_id, RunRow.key_id == key_id))
    return query


async def newest(session: AsyncSession, team_id: str, target: str, limit: int) -> Sequence[Checkpoint]:
    """A team's checkpoints for one purpose, the newest first; not the snapshots that belong to one sampler."""
    query = select(CheckpointRow).filter_by(team_id=team_id, target=target, sampler_id=None)
    query = query.where(_not_expired()).order_by(CheckpointRow.created_at.desc()).limit(limit)
    return views(await session.scalars(query))


async def of_samplers(session: AsyncSession, sampler_ids: Sequence[str]) -> Sequence[Checkpoint]:
    """The snapshots that belong to samplers."""
    return views(await session.scalars(select(CheckpointRow).where(CheckpointRow.sampler_id.in_(sampler_ids))))


async def all_ids(session: AsyncSession) -> set[str]:
    return set((await session.scalars(select(CheckpointRow.id))).all())


async def count(session: AsyncSession) -> int:
    return int(await session.scalar(select(func.count()).select_from(CheckpointRow)) or 0)


async def expired(session: AsyncSession, now: float) -> Sequence[Checkpoint]:
    return views(await session.scalars(select(CheckpointRow).where(CheckpointRow.expires_at < now)))


async def update(session: AsyncSession, id: str, **values: bool | float | None) -> None:
    await session.execute(update_rows(CheckpointRow).where(CheckpointRow.id == id).values(**values))


async def remove(session: AsyncSession, id: str) -> None:
    await session.execute(delete(CheckpointRow).where(CheckpointRow.id == id))
