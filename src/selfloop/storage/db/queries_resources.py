"""Rows of sessions, deployments, runs and samplers."""

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import DeploymentRow, RunRow, SamplerRow, SessionRow, StatusChangeRow


async def session_row(session: AsyncSession, id: str) -> SessionRow | None:
    return await session.get(SessionRow, id)


async def run(session: AsyncSession, id: str) -> RunRow | None:
    return await session.get(RunRow, id)


async def deployment(session: AsyncSession, id: str) -> DeploymentRow | None:
    return await session.get(DeploymentRow, id)


async def sampler(session: AsyncSession, id: str) -> SamplerRow | None:
    return await session.get(SamplerRow, id)


async def runs(
    session: AsyncSession,
    *,
    team_id: str | None = None,
    key_id: str | None = None,
    run_id: str | None = None,
    session_id: str | None = None,
    deployment_id: str | None = None,
    base_model: str | None = None,
    status: str | None = None,
) -> Sequence[RunRow]:
    """Runs that match every given filter, newest first."""
    filters = {
        "team_id": team_id,
        "key_id": key_id,
        "id": run_id,
        "session_id": session_id,
        "deployment_id": deployment_id,
        "base_model": base_model,
        "status": status,
    }
    query = select(RunRow).filter_by(**{k: v for k, v in filters.items() if v is not None})
    return (await session.scalars(query.order_by(RunRow.created_at.desc()))).all()


async def deployments(
    session: AsyncSession, *, team_id: str | None = None, key_id: str | None = None
) -> Sequence[DeploymentRow]:
    filters = {"team_id": team_id, "key_id": key_id}
    query = select(DeploymentRow).filter_by(**{k: v for k, v in filters.items() if v is not None})
    return (await session.scalars(query.order_by(DeploymentRow.created_at.desc()))).all()


async def samplers(
    session: AsyncSession,
    *,
    team_id: str | None = None,
    key_id: str | None = None,
    session_id: str | None = None,
    run_id: str | None = None,
    model_id: str | None = None,
    deployment_id: str | None = None,
) -> Sequence[SamplerRow]:
    """Samplers that match every given filter, newest first."""
    filters = {
        "team_id": team_id,
        "key_id": key_id,
        "session_id": session_id,
        "run_id": run_id,
        "model_id": model_id,
        "deployment_id": deployment_id,
    }
    query = select(SamplerRow).filter_by(**{k: v for k, v in filters.items() if v is not None})
    return (await session.scalars(query.order_by(SamplerRow.created_at.desc()))).all()


async def followers(session: AsyncSession, run_id: str) -> Sequence[SamplerRow]:
    """Samplers that go over to what the run saves for its followers."""
    return (await session.scalars(select(SamplerRow).where(SamplerRow.follows == run_id))).all()


async def open_sessions(session: AsyncSession) -> Sequence[SessionRow]:
    """Sessions that tell of themselves and have not ended."""
    asked = select(SessionRow).where(SessionRow.details.is_not(None), SessionRow.ended_at.is_(None))
    return (await session.scalars(asked)).all()


async def count_clone(session: AsyncSession, sampler_id: str) -> int:
    """One more client has joined the sampler; returns how many have."""
    counted = (
        update(SamplerRow)
        .where(SamplerRow.id == sampler_id)
        .values(num_clones=SamplerRow.num_clones + 1)
        .returning(SamplerRow.num_clones)
    )
    return (await session.execute(counted)).scalar_one()


async def update_session(session: AsyncSession, id: str, **values: str | float | None) -> None:
    await session.execute(update(SessionRow).where(SessionRow.id == id).values(**values))


async def update_run(session: AsyncSession, id: str, **values: str | int | float | None) -> None:
    await session.execute(update(RunRow).where(RunRow.id == id).values(**values))


async def update_deployment(session: AsyncSession, id: str, **values: str | int | float | None) -> None:
    await session.execute(update(DeploymentRow).where(DeploymentRow.id == id).values(**values))


async def update_sampler(session: AsyncSession, id: str, **values: str | int | float | None) -> None:
    await session.execute(update(SamplerRow).where(SamplerRow.id == id).values(**values))


async def last_change(session: AsyncSession, resource_id: str) -> StatusChangeRow | None:
    """The latest transition of a run, deployment or sampler."""
    return await session.scalar(
        select(StatusChangeRow)
        .where(StatusChangeRow.resource_id == resource_id)
        .order_by(StatusChangeRow.id.desc())
        .limit(1)
    )
