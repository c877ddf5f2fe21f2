"""Pages of runs, checkpoints and sessions, newest first, and what belongs to each."""

import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Select, and_, cast, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.keyset import Cut, Part, part
from selfloop.storage.db.portable import batched, json_text, total
from selfloop.storage.db.tables import CheckpointRow, OperationRow, RunRow, SamplerRow, SessionRow, view, views
from selfloop.types.resources import Checkpoint, Run, Session

NO_PROJECT = "default"
"""The project of sessions that name none."""


class Owner(NamedTuple):
    """Whose rows: of one key, or of a whole team when ``key_id`` is None."""

    team_id: str
    key_id: str | None


class Page(NamedTuple):
    """Rows ``offset`` to ``offset + limit``."""

    limit: int
    offset: int


class SessionTotals(NamedTuple):
    num_checkpoints: int
    size_bytes: int


class SessionSearch(NamedTuple):
    """All that is given must hold, except that a session may have the id or the display name.

    Args:
        key_ids: of those keys only.
        states: ``active``, or the reason why a session ended.
        after: creation time and id of the last one already seen.
    """

    team_id: str
    limit: int
    session_id: str | None = None
    display_name: str | None = None
    project_ids: Sequence[str] | None = None
    user_metadata: dict[str, str] = {}
    key_ids: Collection[str] | None = None
    states: Collection[str] | None = None
    after: tuple[float, str] | None = None


class CheckpointSearch(NamedTuple):
    """All that is given must hold.

    Args:
        key_ids: of runs of those keys only.
        after: creation time and id of the last one already seen.
    """

    team_id: str
    limit: int
    project_ids: Sequence[str] | None = None
    user_metadata: dict[str, str] = {}
    target: str | None = None
    key_ids: Collection[str] | None = None
    base_models: Collection[str] | None = None
    after: tuple[float, str] | None = None


def _stored_now() -> ColumnElement[bool]:
    """Checkpoints with an address that have not expired."""
    alive = or_(CheckpointRow.expires_at.is_(None), CheckpointRow.expires_at > time.time())
    return and_(CheckpointRow.sampler_id.is_(None), alive)


def project_of_session() -> ColumnElement[str]:
    return func.coalesce(json_text(SessionRow.details, "project_id"), NO_PROJECT)


async def _page(session: AsyncSession, query: "Select[Any]", order: Sequence[Any], page: Page) -> Any:
    total = await session.scalar(select(func.count()).select_from(query.subquery()))
    rows = await session.scalars(query.order_by(*order).limit(page.limit).offset(page.offset))
    return views(rows), int(total or 0)


async def runs(
    session: AsyncSession, owner: Owner, page: Page, *, with_published: bool, project_id: str | None
) -> tuple[Sequence[Run], int]:
    """A page of runs and how many there are; with those of other teams that have published something."""
    owned = RunRow.team_id == owner.team_id
    if owner.key_id is not None:
        owned = and_(owned, RunRow.key_id == owner.key_id)
    if with_published:
        published = select(CheckpointRow.run_id).where(CheckpointRow.public, _stored_now())
        owned = or_(owned, RunRow.id.in_(published))
    query = select(RunRow).where(owned)
    if project_id is not None:
        query = query.join(SessionRow, SessionRow.id == RunRow.session_id).where(
            project_of_session() == project_id, SessionRow.team_id == owner.team_id
        )
    return await _page(session, query, (RunRow.created_at.desc(), RunRow.id), page)


async def checkpoints(session: AsyncSession, owner: Owner, page: Page) -> tuple[Sequence[Checkpoint], int]:
    query = select(CheckpointRow).join(RunRow, RunRow.id == CheckpointRow.run_id)
    query = query.where(RunRow.team_id == owner.team_id, _stored_now())
    if owner.key_id is not None:
        query = query.where(RunRow.key_id == owner.key_id)
    return await _page(session, query, (CheckpointRow.created_at.desc(), CheckpointRow.id), page)


async def checkpoints_of(
    session: AsyncSession, run_id: str, cut: Cut, *, public_only: bool = False
) -> Part[Checkpoint]:
    """The checkpoints of a run, newest first."""
    query = select(CheckpointRow).where(CheckpointRow.run_id == run_id, _stored_now())
    return (await part(session, query.where(CheckpointRow.public) if public_only else query, CheckpointRow, cut)).map(
        lambda row: row.view()
    )


async def last_checkpoints(session: AsyncSession, run_ids: Collection[str], team_id: str) -> Sequence[Checkpoint]:
    """The newest checkpoint of each run for each target; of other teams' runs of what they published."""
    found: list[Checkpoint] = []
    for ids in batched(sorted(run_ids)):
        place = func.row_number().over(
            partition_by=(CheckpointRow.run_id, CheckpointRow.target),
            order_by=(CheckpointRow.created_at.desc(), CheckpointRow.id.desc()),
        )
        seen = or_(CheckpointRow.team_id == team_id, CheckpointRow.public)
        ranked = select(CheckpointRow.id, place.label("place"))
        ranked = ranked.where(CheckpointRow.run_id.in_(ids), seen, _stored_now()).subquery()
        first = select(ranked.c.id).where(ranked.c.place == 1)
        found += views(await session.scalars(select(CheckpointRow).where(CheckpointRow.id.in_(first))))
    return found


async def last_requests(session: AsyncSession, run_ids: Collection[str]) -> dict[str, float]:
    """When each run last took an operation; runs that never did are left out."""
    found: dict[str, float] = {}
    for ids in batched(sorted(run_ids)):
        query = select(OperationRow.run_id, func.max(OperationRow.created_at)).where(OperationRow.run_id.in_(ids))
        rows = await session.execute(query.group_by(OperationRow.run_id))
        found |= {row[0]: float(row[1]) for row in rows}
    return found


async def sessions(session: AsyncSession, owner: Owner, page: Page) -> tuple[Sequence[Session], int]:
    query = select(SessionRow).where(SessionRow.team_id == owner.team_id)
    if owner.key_id is not None:
        query = query.where(SessionRow.key_id == owner.key_id)
    return await _page(session, query, (SessionRow.created_at.desc(), SessionRow.id), page)


async def of_session(session: AsyncSession, id: str) -> tuple[Sequence[str], Sequence[str]]:
    """Ids of the session's runs and samplers, oldest first."""
    runs = select(RunRow.id).where(RunRow.session_id == id).order_by(RunRow.created_at)
    samplers = select(SamplerRow.id).where(SamplerRow.session_id == id).order_by(SamplerRow.created_at)
    return (await session.scalars(runs)).all(), (await session.scalars(samplers)).all()


async def samplers_of_run(session: AsyncSession, run_id: str) -> Sequence[str]:
    """Ids of the samplers that sample from the weights of a run, oldest first."""
    of_it = or_(SamplerRow.run_id == run_id, SamplerRow.follows == run_id)
    return (await session.scalars(select(SamplerRow.id).where(of_it).order_by(SamplerRow.created_at))).all()


async def search_sessions(session: AsyncSession, search: SessionSearch) -> Sequence[Session]:
    # Whole microseconds, which is what a caller hands back.
    made_us = cast(func.round(SessionRow.created_at * 1e6), BigInteger)
    query = select(SessionRow).where(SessionRow.team_id == search.team_id)
    named: list[ColumnElement[bool]] = []
    if search.session_id is not None:
        named.append(SessionRow.id == search.session_id)
    if search.display_name is not None:
        named.append(json_text(SessionRow.details, "display_name") == search.display_name)
    if named:
        query = query.where(or_(*named))
    if search.project_ids is not None:
        query = query.where(project_of_session().in_(list(search.project_ids)))
    for key, value in search.user_metadata.items():
        query = query.where(json_text(json_text(SessionRow.details, "user_metadata"), key) == value)
    if search.key_ids is not None:
        query = query.where(SessionRow.key_id.in_(list(search.key_ids)))
    if search.states is not None:
        state = func.coalesce(SessionRow.end_reason, "active")
        query = query.where(state.in_(list(search.states)))
    if search.after is not None:
        query = query.where(tuple_(made_us, SessionRow.id) < (round(search.after[0] * 1e6), search.after[1]))
    query = query.order_by(made_us.desc(), SessionRow.id.desc()).limit(search.limit)
    return views(await session.scalars(query))


async def search_checkpoints(session: AsyncSession, search: CheckpointSearch) -> Sequence[Checkpoint]:
    made_us = cast(func.round(CheckpointRow.created_at * 1e6), BigInteger)
    query = select(CheckpointRow).join(RunRow, RunRow.id == CheckpointRow.run_id)
    query = query.where(RunRow.team_id == search.team_id, _stored_now())
    if search.project_ids is not None:
        query = query.join(SessionRow, SessionRow.id == RunRow.session_id)
        query = query.where(project_of_session().in_(list(search.project_ids)))
    for key, value in search.user_metadata.items():
        query = query.where(json_text(CheckpointRow.user_metadata, key) == value)
    if search.target is not None:
        query = query.where(CheckpointRow.target == search.target)
    if search.key_ids is not None:
        query = query.where(RunRow.key_id.in_(list(search.key_ids)))
    if search.base_models is not None:
        query = query.where(CheckpointRow.base_model.in_(list(search.base_models)))
    if search.after is not None:
        query = query.where(tuple_(made_us, CheckpointRow.id) < (round(search.after[0] * 1e6), search.after[1]))
    query = query.order_by(made_us.desc(), CheckpointRow.id.desc()).limit(search.limit)
    return views(await session.scalars(query))


async def session_totals(session: AsyncSession, ids: Collection[str]) -> dict[str, SessionTotals]:
    """What the checkpoints of each session's runs come to; sessions without any are left out."""
    query = (
        select(RunRow.session_id, func.count(CheckpointRow.id), total(CheckpointRow.size_bytes))
        .join(CheckpointRow, CheckpointRow.run_id == RunRow.id)
        .where(RunRow.session_id.in_(list(ids)), _stored_now())
        .group_by(RunRow.session_id)
    )
    return {row[0]: SessionTotals(int(row[1]), int(row[2])) for row in await session.execute(query)}


async def run_of_copy(session: AsyncSession, team_id: str, copy_key: str) -> Run | None:
    return view(await session.scalar(select(RunRow).filter_by(team_id=team_id, copy_key=copy_key)))
