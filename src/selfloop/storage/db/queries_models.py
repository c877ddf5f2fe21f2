"""Rows of the model catalogue."""

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import AliasRow, ModelRow, view, views
from selfloop.types.resources import Alias, CatalogueEntry


async def models(session: AsyncSession) -> Sequence[CatalogueEntry]:
    return views(await session.scalars(select(ModelRow).order_by(ModelRow.created_at)))


async def model(session: AsyncSession, name: str) -> CatalogueEntry | None:
    return view(await session.get(ModelRow, name))


async def aliases(session: AsyncSession) -> Sequence[Alias]:
    return views(await session.scalars(select(AliasRow).order_by(AliasRow.alias)))


async def alias(session: AsyncSession, name: str) -> Alias | None:
    return view(await session.get(AliasRow, name))


async def set_path(session: AsyncSession, name: str, path: str) -> None:
    await session.execute(update(ModelRow).where(ModelRow.name == name).values(path=path))
