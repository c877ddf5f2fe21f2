"""Rows of deployed models, their versions, and the checkpoints that samplers hold."""

from collections.abc import Collection, Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.keyset import Cut, Part, part
from selfloop.storage.db.tables import DeployedModelRow, ModelVersionRow, PinnedCheckpointRow, view, views
from selfloop.types.resources import ModelVersion, PinnedCheckpoint


async def models(session: AsyncSession, team_id: str, name: str | None = None) -> Sequence[DeployedModelRow]:
    """A team's models, newest first."""
    query = select(DeployedModelRow).filter_by(team_id=team_id)
    if name is not None:
        query = query.filter_by(name=name)
    return (await session.scalars(query.order_by(DeployedModelRow.created_at.desc()))).all()


async def model(session: AsyncSession, id: str) -> DeployedModelRow | None:
    return await session.get(DeployedModelRow, id)


async def models_part(session: AsyncSession, cut: Cut, team_id: str, name: str | None) -> Part[DeployedModelRow]:
    query = select(DeployedModelRow).filter_by(team_id=team_id, **({} if name is None else {"name": name}))
    return await part(session, query, DeployedModelRow, cut)


async def versions(session: AsyncSession, sampler_ids: Collection[str]) -> dict[str, ModelVersion]:
    """What was said with each deploy, by its sampler; other samplers are absent."""
    rows = await session.scalars(select(ModelVersionRow).where(ModelVersionRow.sampler_id.in_(list(sampler_ids))))
    return {row.sampler_id: row.view() for row in rows}


async def next_number(session: AsyncSession, model_id: str) -> int:
    highest = await session.scalar(select(func.max(ModelVersionRow.number)).filter_by(model_id=model_id))
    return (highest or 0) + 1


async def held(session: AsyncSession, sampler_id: str) -> Sequence[PinnedCheckpoint]:
    """What a sampler holds, its default first."""
    query = select(PinnedCheckpointRow).filter_by(sampler_id=sampler_id).order_by(PinnedCheckpointRow.position)
    return views(await session.scalars(query))


async def held_by(session: AsyncSession, sampler_ids: Collection[str]) -> dict[str, list[PinnedCheckpoint]]:
    """What each sampler holds, its default first; samplers that hold nothing are absent."""
    query = select(PinnedCheckpointRow).where(PinnedCheckpointRow.sampler_id.in_(list(sampler_ids)))
    found: dict[str, list[PinnedCheckpoint]] = {}
    for row in await session.scalars(query.order_by(PinnedCheckpointRow.sampler_id, PinnedCheckpointRow.position)):
        found.setdefault(row.sampler_id, []).append(row.view())
    return found


async def pinned_one(session: AsyncSession, sampler_id: str, checkpoint_id: str) -> PinnedCheckpoint | None:
    return view(await session.get(PinnedCheckpointRow, (sampler_id, checkpoint_id)))


async def holders(session: AsyncSession) -> set[str]:
    """Samplers that hold anything."""
    return set((await session.scalars(select(PinnedCheckpointRow.sampler_id))).all())


async def release(session: AsyncSession, sampler_id: str) -> None:
    await session.execute(delete(PinnedCheckpointRow).where(PinnedCheckpointRow.sampler_id == sampler_id))
