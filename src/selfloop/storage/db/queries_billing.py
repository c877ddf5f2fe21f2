"""Usage by the hour with what it was for, and the bytes that checkpoints take."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.portable import total
from selfloop.storage.db.queries_listings import project_of_session
from selfloop.storage.db.tables import CheckpointRow, RunRow, SamplerRow, SessionRow, UsageRow


class HourlyUsage(NamedTuple):
    """Of one key in one hour (its start in UNIX seconds), for the runs and samplers of a session."""

    hour: int
    key_id: str
    session_id: str | None
    base_model: str | None
    tokens_forwarded: int
    tokens_prefilled: int
    tokens_sampled: int


class StoredCheckpoint(NamedTuple):
    """``removed_at`` is when it expires, None for never."""

    key_id: str
    session_id: str
    base_model: str
    size_bytes: int
    created_at: float
    removed_at: float | None


class ProjectStorage(NamedTuple):
    project_id: str
    key_id: str
    num_checkpoints: int
    size_bytes: int


async def hourly(session: AsyncSession, team_id: str, start: float, end: float) -> Sequence[HourlyUsage]:
    """Usage of a team in the hours that begin in [start, end), oldest first."""
    of_run = select(RunRow.id, RunRow.session_id, RunRow.base_model).subquery()
    session_id = func.coalesce(of_run.c.session_id, SamplerRow.session_id)
    base_model = func.coalesce(of_run.c.base_model, SamplerRow.base_model)
    counts = (UsageRow.tokens_forwarded, UsageRow.tokens_prefilled, UsageRow.tokens_sampled)
    query = (
        select(UsageRow.hour, UsageRow.key_id, session_id, base_model, *(total(count) for count in counts))
        .outerjoin(of_run, of_run.c.id == UsageRow.run_id)
        .outerjoin(SamplerRow, SamplerRow.id == UsageRow.sampler_id)
        .where(UsageRow.team_id == team_id, UsageRow.hour >= start, UsageRow.hour < end)
        .group_by(UsageRow.hour, UsageRow.key_id, session_id, base_model)
        .order_by(UsageRow.hour, UsageRow.key_id)
    )
    return [HourlyUsage(*row) for row in await session.execute(query)]


async def stored_between(session: AsyncSession, team_id: str, start: float, end: float) -> Sequence[StoredCheckpoint]:
    """The checkpoints of a team that are there now and were at some time in [start, end)."""
    query = (
        select(
            RunRow.key_id,
            RunRow.session_id,
            CheckpointRow.base_model,
            CheckpointRow.size_bytes,
            CheckpointRow.created_at,
            CheckpointRow.expires_at,
        )
        .join(RunRow, RunRow.id == CheckpointRow.run_id)
        .where(CheckpointRow.team_id == team_id, CheckpointRow.created_at < end)
        .where(or_(CheckpointRow.expires_at.is_(None), CheckpointRow.expires_at > start))
    )
    return [StoredCheckpoint(*row) for row in await session.execute(query)]


async def storage_now(session: AsyncSession, team_id: str, now: float) -> Sequence[ProjectStorage]:
    """What the checkpoints of a team take, by project and key."""
    project = project_of_session()
    query = (
        select(project, RunRow.key_id, func.count(CheckpointRow.id), total(CheckpointRow.size_bytes))
        .join(RunRow, RunRow.id == CheckpointRow.run_id)
        .join(SessionRow, SessionRow.id == RunRow.session_id)
        .where(CheckpointRow.team_id == team_id)
        .where(or_(CheckpointRow.expires_at.is_(None), CheckpointRow.expires_at > now))
        .group_by(project, RunRow.key_id)
        .order_by(project, RunRow.key_id)
    )
    return [ProjectStorage(*row) for row in await session.execute(query)]
