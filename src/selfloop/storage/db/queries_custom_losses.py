"""Reads of uploaded losses."""

from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import CustomLossRow


async def custom_loss(session: AsyncSession, session_id: str, number: int) -> CustomLossRow | None:
    return await session.get(CustomLossRow, (session_id, number))
