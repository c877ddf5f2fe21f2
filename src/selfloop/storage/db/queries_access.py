"""Rows of teams and keys."""

from collections.abc import Mapping, Sequence

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import KeyRow, TeamRow, UserConfigRow


async def teams(session: AsyncSession) -> Sequence[TeamRow]:
    return (await session.scalars(select(TeamRow).order_by(TeamRow.created_at))).all()


async def team(session: AsyncSession, id: str) -> TeamRow | None:
    return await session.get(TeamRow, id)


async def team_named(session: AsyncSession, name: str) -> TeamRow | None:
    return await session.scalar(select(TeamRow).filter_by(name=name))


async def default_team(session: AsyncSession) -> TeamRow | None:
    return await session.scalar(select(TeamRow).filter_by(is_default=True))


async def key_by_hash(session: AsyncSession, sha256: str) -> KeyRow | None:
    return await session.scalar(select(KeyRow).filter_by(sha256=sha256))


async def key(session: AsyncSession, id: str) -> KeyRow | None:
    return await session.get(KeyRow, id)


async def keys(session: AsyncSession, team_id: str | None = None) -> Sequence[KeyRow]:
    """Every key, or those of a team; the oldest first."""
    query = select(KeyRow).order_by(KeyRow.created_at)
    return (await session.scalars(query if team_id is None else query.filter_by(team_id=team_id))).all()


async def revoke(session: AsyncSession, id: str, at: float) -> bool:
    changed = await session.execute(
        update(KeyRow).where(KeyRow.id == id, KeyRow.revoked_at.is_(None)).values(revoked_at=at)
    )
    return getattr(changed, "rowcount", 0) == 1


async def user_config(session: AsyncSession, key_id: str) -> UserConfigRow | None:
    return await session.get(UserConfigRow, key_id)


async def set_user_config(session: AsyncSession, key_id: str, changes: Mapping[str, list[str] | None]) -> None:
    """Set the named columns, leave the others."""
    row = await session.get(UserConfigRow, key_id)
    if row is None:
        row = UserConfigRow(key_id=key_id)
        session.add(row)
    for column, value in changes.items():
        setattr(row, column, value)
