"""Rows of usage and of deployments' metrics."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.portable import batched, insert_or_update, total
from selfloop.storage.db.tables import (
    CheckpointRow,
    DeploymentMinuteRow,
    KeyRow,
    RunRow,
    StatusChangeRow,
    TeamRow,
    UsageRow,
)


class UsageKey(NamedTuple):
    """An account: ids are empty where there is none; ``hour`` is the hour's start in UNIX seconds."""

    team_id: str
    hour: int
    key_id: str
    run_id: str
    sampler_id: str


class Counts(msgspec.Struct, frozen=True):
    """Finished operations, answered sampling requests, tokens by use, and seconds that workers computed."""

    operations: int = 0
    samples: int = 0
    tokens_trained: int = 0
    tokens_forwarded: int = 0
    tokens_prefilled: int = 0
    tokens_sampled: int = 0
    compute_s: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))


_COUNTS = tuple(field.name for field in msgspec.structs.fields(Counts))


def _total(name: str) -> ColumnElement[Any]:
    return func.sum(UsageRow.compute_s) if name == "compute_s" else total(UsageRow.__table__.c[name])


async def add_usage(session: AsyncSession, key: UsageKey, counts: Counts) -> None:
    statement = insert_or_update(session, UsageRow).values(**key._asdict(), **msgspec.structs.asdict(counts))
    table = UsageRow.__table__.c
    added = {name: table[name] + statement.excluded[name] for name in _COUNTS}
    await session.execute(statement.on_conflict_do_update(index_elements=list(UsageKey._fields), set_=added))


async def usage(
    session: AsyncSession,
    group_by: Literal["run", "key", "team"],
    *,
    team_id: str | None,
    key_id: str | None,
    run_id: str | None,
    start: int | None,
    end: float | None,
) -> dict[str, Counts]:
    """Totals by id of the group."""
    column = {"run": UsageRow.run_id, "key": UsageRow.key_id, "team": UsageRow.team_id}[group_by]
    query = select(column, *(_total(name) for name in _COUNTS)).group_by(column)
    for kept, wanted in ((UsageRow.team_id, team_id), (UsageRow.key_id, key_id), (UsageRow.run_id, run_id)):
        if wanted is not None:
            query = query.where(kept == wanted)
    if start is not None:
        query = query.where(UsageRow.hour >= start)
    if end is not None:
        query = query.where(UsageRow.hour < end)
    return {row[0]: Counts(*row[1:]) for row in await session.execute(query)}


async def checkpoint_bytes(
    session: AsyncSession,
    group_by: Literal["run", "key", "team"],
    *,
    team_id: str | None = None,
    key_id: str | None = None,
    run_id: str | None = None,
) -> dict[str, int]:
    """Bytes stored now, by id of the group; a checkpoint belongs to its run's key."""
    column = {"run": CheckpointRow.run_id, "key": RunRow.key_id, "team": CheckpointRow.team_id}[group_by]
    query = select(column, total(CheckpointRow.size_bytes)).join(RunRow, RunRow.id == CheckpointRow.run_id)
    if team_id is not None:
        query = query.where(CheckpointRow.team_id == team_id)
    if key_id is not None:
        query = query.where(RunRow.key_id == key_id)
    if run_id is not None:
        query = query.where(CheckpointRow.run_id == run_id)
    return {row[0]: int(row[1]) for row in await session.execute(query.group_by(column))}


async def all_checkpoint_bytes(session: AsyncSession) -> int:
    return int(await session.scalar(select(func.coalesce(total(CheckpointRow.size_bytes), 0))) or 0)


async def labels(
    session: AsyncSession, group_by: Literal["run", "key", "team"], ids: Collection[str]
) -> dict[str, str]:
    """Names by id."""
    kind = {"run": RunRow, "key": KeyRow, "team": TeamRow}[group_by]
    found: dict[str, str] = {}
    for some in batched(sorted(ids)):
        rows = await session.execute(select(kind.id, kind.name).where(kind.id.in_(some)))
        found |= {row[0]: row[1] for row in rows}
    return found


async def add_minute(session: AsyncSession, deployment_id: str, minute: int, data: bytes) -> None:
    statement = insert_or_update(session, DeploymentMinuteRow).values(
        deployment_id=deployment_id, minute=minute, data=data
    )
    await session.execute(
        statement.on_conflict_do_update(
            index_elements=["deployment_id", "minute"], set_={"data": statement.excluded.data}
        )
    )


async def minutes(session: AsyncSession, deployment_id: str, start: int, end: int) -> Sequence[DeploymentMinuteRow]:
    """Minutes of a deployment that begin in [start, end)."""
    rows = await session.scalars(
        select(DeploymentMinuteRow)
        .where(
            DeploymentMinuteRow.deployment_id == deployment_id,
            DeploymentMinuteRow.minute >= start,
            DeploymentMinuteRow.minute < end,
        )
        .order_by(DeploymentMinuteRow.minute)
    )
    return rows.all()


async def forget_minutes(session: AsyncSession, before: int) -> None:
    await session.execute(delete(DeploymentMinuteRow).where(DeploymentMinuteRow.minute < before))


async def status_changes(session: AsyncSession, ids: Collection[str]) -> Sequence[StatusChangeRow]:
    """Every transition of these resources, oldest first."""
    found: list[StatusChangeRow] = []
    for some in batched(sorted(ids)):
        found += (await session.scalars(select(StatusChangeRow).where(StatusChangeRow.resource_id.in_(some)))).all()
    return sorted(found, key=lambda row: row.id)
