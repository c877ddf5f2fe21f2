"""Rows of the model catalogue."""

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import AliasRow, ModelRow


async def models(session: AsyncSession) -> Sequence[ModelRow]:
    return (await session.scalars(select(ModelRow).order_by(ModelRow.created_at))).all()


async def model(session: AsyncSession, name: str) -> ModelRow | None:
    return await session.get(ModelRow, name)


async def aliases(session: AsyncSession) -> Sequence[AliasRow]:
    return (await session.scalars(select(AliasRow).order_by(AliasRow.alias))).all()


async def alias(session: AsyncSession, name: str) -> AliasRow | None:
    return await session.get(AliasRow, name)


async def set_path(session: AsyncSession, name: str, path: str) -> None:
    await session.execute(update(ModelRow).where(ModelRow.name == name).values(path=path))
