"""Rows of sessions, deployments, runs and samplers."""

from collections.abc import Collection, Sequence
from typing import TypeVar

from sqlalchemy import Select, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.keyset import Cut, Part, part
from selfloop.storage.db.portable import batched
from selfloop.storage.db.tables import (
    CustomLossRow,
    DeploymentRow,
    RunRow,
    SamplerRow,
    SessionRow,
    StatusChangeRow,
    view,
    views,
)
from selfloop.types.resources import Deployment, Run, Sampler, Session
from selfloop.types.status import DeploymentStatus, RunStatus, SamplerStatus

R = TypeVar("R", RunRow, DeploymentRow, SamplerRow)

# By name, so that an index finds them: most rows of an old database have ended.
_LIVE_DEPLOYMENTS = [status for status in DeploymentStatus if status != DeploymentStatus.STOPPED]
_LIVE_SAMPLERS = [status for status in SamplerStatus if status != SamplerStatus.INACTIVE]


async def session_row(session: AsyncSession, id: str) -> Session | None:
    return view(await session.get(SessionRow, id))


async def run(session: AsyncSession, id: str) -> Run | None:
    return view(await session.get(RunRow, id))


async def deployment(session: AsyncSession, id: str) -> Deployment | None:
    return view(await session.get(DeploymentRow, id))


async def sampler(session: AsyncSession, id: str) -> Sampler | None:
    return view(await session.get(SamplerRow, id))


async def runs(
    session: AsyncSession,
    *,
    team_id: str | None = None,
    session_id: str | None = None,
    deployment_id: str | None = None,
    status: str | None = None,
) -> Sequence[Run]:
    """Runs that match every given filter, newest first."""
    query = _filtered(RunRow, team_id=team_id, session_id=session_id, deployment_id=deployment_id, status=status)
    return views(await session.scalars(query.order_by(RunRow.created_at.desc(), RunRow.id.desc())))


async def runs_part(
    session: AsyncSession,
    cut: Cut,
    *,
    team_id: str | None = None,
    key_id: str | None = None,
    run_id: str | None = None,
    base_model: str | None = None,
) -> Part[Run]:
    query = _filtered(RunRow, team_id=team_id, key_id=key_id, id=run_id, base_model=base_model)
    found = await part(session, query, RunRow, cut)
    return found.map(lambda row: row.view())


async def runs_named(session: AsyncSession, ids: Collection[str]) -> dict[str, Run]:
    """Those of the ids that are there."""
    found: dict[str, Run] = {}
    for some in batched(sorted(ids)):
        found |= {row.id: row.view() for row in await session.scalars(select(RunRow).where(RunRow.id.in_(some)))}
    return found


async def run_rows(session: AsyncSession, ids: Collection[str]) -> dict[str, RunRow]:
    """The same as rows, which a run's queue keeps equal to what it writes."""
    found: dict[str, RunRow] = {}
    for some in batched(sorted(ids)):
        found |= {row.id: row for row in await session.scalars(select(RunRow).where(RunRow.id.in_(some)))}
    return found


async def deployments_of_runs(session: AsyncSession, run_ids: Collection[str]) -> dict[str, str]:
    """The deployment that each run is on."""
    found: dict[str, str] = {}
    for ids in batched(sorted(run_ids)):
        rows = await session.execute(select(RunRow.id, RunRow.deployment_id).where(RunRow.id.in_(ids)))
        found |= {row[0]: row[1] for row in rows}
    return found


async def run_ids_on(session: AsyncSession, deployment_id: str) -> Sequence[str]:
    """Every run that the deployment has had, newest first."""
    query = select(RunRow.id).where(RunRow.deployment_id == deployment_id)
    return (await session.scalars(query.order_by(RunRow.created_at.desc(), RunRow.id.desc()))).all()


async def active_runs_on(session: AsyncSession, deployment_ids: Collection[str]) -> dict[str, str]:
    """The newest active run of each deployment; those without are absent."""
    query = select(RunRow.deployment_id, RunRow.id).where(
        RunRow.deployment_id.in_(list(deployment_ids)), RunRow.status == RunStatus.ACTIVE
    )
    rows = await session.execute(query.order_by(RunRow.created_at, RunRow.id))
    return {row[0]: row[1] for row in rows}


async def newest_samplers_on(session: AsyncSession, deployment_ids: Collection[str]) -> dict[str, Sampler]:
    """The sampler of the newest run that has one, by trainer deployment."""
    newest = (
        select(SamplerRow.id)
        .join(RunRow, RunRow.id == SamplerRow.run_id)
        .where(RunRow.deployment_id == DeploymentRow.id)
        .order_by(RunRow.created_at.desc(), RunRow.id.desc(), SamplerRow.created_at.desc())
        .limit(1)
        .correlate(DeploymentRow)
        .scalar_subquery()
    )
    asked = select(DeploymentRow.id, newest).where(DeploymentRow.id.in_(list(deployment_ids)))
    ids: dict[str, str] = {sampler: id for id, sampler in await session.execute(asked) if sampler}
    rows = await session.scalars(select(SamplerRow).where(SamplerRow.id.in_(list(ids))))
    return {ids[row.id]: row.view() for row in rows}


async def deployments_part(
    session: AsyncSession, cut: Cut, *, team_id: str, key_id: str | None = None
) -> Part[Deployment]:
    return (await part(session, _filtered(DeploymentRow, team_id=team_id, key_id=key_id), DeploymentRow, cut)).map(
        lambda row: row.view()
    )


async def live_deployments(session: AsyncSession) -> Sequence[Deployment]:
    """Every deployment that has not ended, oldest first."""
    query = select(DeploymentRow).where(DeploymentRow.status.in_(_LIVE_DEPLOYMENTS))
    return views(await session.scalars(query.order_by(DeploymentRow.created_at, DeploymentRow.id)))


async def live_samplers(session: AsyncSession) -> Sequence[Sampler]:
    """Every sampler that has not ended, oldest first."""
    query = select(SamplerRow).where(SamplerRow.status.in_(_LIVE_SAMPLERS))
    return views(await session.scalars(query.order_by(SamplerRow.created_at, SamplerRow.id)))


async def live_among(session: AsyncSession, sampler_ids: Collection[str]) -> set[str]:
    """Those of the samplers that have not ended."""
    found: set[str] = set()
    for ids in batched(sorted(sampler_ids)):
        query = select(SamplerRow.id).where(SamplerRow.id.in_(ids), SamplerRow.status.in_(_LIVE_SAMPLERS))
        found |= set((await session.scalars(query)).all())
    return found


async def samplers(
    session: AsyncSession,
    *,
    team_id: str | None = None,
    session_id: str | None = None,
    run_id: str | None = None,
    model_id: str | None = None,
    deployment_id: str | None = None,
) -> Sequence[Sampler]:
    """Samplers that match every given filter, newest first."""
    query = _filtered(
        SamplerRow,
        team_id=team_id,
        session_id=session_id,
        run_id=run_id,
        model_id=model_id,
        deployment_id=deployment_id,
    )
    return views(await session.scalars(query.order_by(SamplerRow.created_at.desc(), SamplerRow.id.desc())))


async def samplers_part(
    session: AsyncSession, cut: Cut, *, team_id: str, key_id: str | None = None, model_id: str | None = None
) -> Part[Sampler]:
    query = _filtered(SamplerRow, team_id=team_id, key_id=key_id, model_id=model_id)
    found = await part(session, query, SamplerRow, cut)
    return found.map(lambda row: row.view())


async def samplers_of_runs(session: AsyncSession, run_ids: Collection[str]) -> dict[str, Sampler]:
    """The newest sampler of each run; runs without are absent."""
    query = select(SamplerRow).where(SamplerRow.run_id.in_(list(run_ids)))
    rows = await session.scalars(query.order_by(SamplerRow.created_at, SamplerRow.id))
    return {row.run_id: row.view() for row in rows if row.run_id is not None}


async def sampler_ids_of_runs(session: AsyncSession, run_ids: Collection[str]) -> list[str]:
    """Every sampler that is or was paired with one of the runs."""
    found: list[str] = []
    for ids in batched(sorted(run_ids)):
        found += (await session.scalars(select(SamplerRow.id).where(SamplerRow.run_id.in_(ids)))).all()
    return found


async def samplers_named(session: AsyncSession, ids: Collection[str]) -> dict[str, Sampler]:
    """Those of the ids that are there."""
    found: dict[str, Sampler] = {}
    for some in batched(sorted(ids)):
        rows = await session.scalars(select(SamplerRow).where(SamplerRow.id.in_(some)))
        found |= {row.id: row.view() for row in rows}
    return found


async def newest_of_model(
    session: AsyncSession, team_id: str, model_id: str, deployment_id: str | None = None, *, live: bool = False
) -> Sampler | None:
    """The newest sampler behind a model (and a deployment of it); with ``live`` of those that have not ended."""
    query = _filtered(SamplerRow, team_id=team_id, model_id=model_id, deployment_id=deployment_id)
    if live:
        query = query.where(SamplerRow.status.in_(_LIVE_SAMPLERS))
    return view(await session.scalar(query.order_by(SamplerRow.created_at.desc(), SamplerRow.id.desc()).limit(1)))


async def oldest_of_model(session: AsyncSession, team_id: str, model_id: str) -> Sampler | None:
    query = _filtered(SamplerRow, team_id=team_id, model_id=model_id)
    return view(await session.scalar(query.order_by(SamplerRow.created_at, SamplerRow.id).limit(1)))


async def count_deployments(session: AsyncSession, model_ids: Collection[str]) -> dict[str, int]:
    """How many deployments each model has had."""
    query = select(SamplerRow.model_id, func.count(SamplerRow.deployment_id.distinct())).where(
        SamplerRow.model_id.in_(list(model_ids))
    )
    return {row[0]: int(row[1]) for row in await session.execute(query.group_by(SamplerRow.model_id))}


async def live_deployment_of(session: AsyncSession, model_ids: Collection[str]) -> dict[str, str]:
    """The newest deployment of each model that has not ended; models without are absent."""
    query = select(SamplerRow.model_id, SamplerRow.deployment_id).where(
        SamplerRow.model_id.in_(list(model_ids)), SamplerRow.status.in_(_LIVE_SAMPLERS)
    )
    rows = await session.execute(query.order_by(SamplerRow.created_at, SamplerRow.id))
    return {row[0]: row[1] for row in rows}


def _filtered(table: type[R], **filters: str | None) -> "Select[R]":
    return select(table).filter_by(**{name: value for name, value in filters.items() if value is not None})


async def followers(session: AsyncSession, run_id: str) -> Sequence[Sampler]:
    """Samplers that go over to what the run saves for its followers."""
    return views(await session.scalars(select(SamplerRow).where(SamplerRow.follows == run_id)))


async def open_sessions(session: AsyncSession) -> Sequence[Session]:
    """Sessions that send heartbeats and have not ended."""
    asked = select(SessionRow).where(SessionRow.details.is_not(None), SessionRow.ended_at.is_(None))
    return views(await session.scalars(asked))


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


async def custom_loss(session: AsyncSession, session_id: str, number: int) -> CustomLossRow | None:
    return await session.get(CustomLossRow, (session_id, number))
