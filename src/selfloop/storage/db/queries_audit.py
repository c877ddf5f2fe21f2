"""Rows of the audit log."""

import time
from collections.abc import Sequence

import msgspec
from sqlalchemy import false, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.storage.db.tables import AuditRow, views
from selfloop.types.resources import AuditEvent, Checkpoint


def record(session: AsyncSession, event: str, team_id: str, key_id: str | None, /, **details: str) -> None:
    """Note what a key (None: the command line) did, in the transaction that does it."""
    session.add(_row(event, team_id, key_id, details))


def record_checkpoint(
    session: AsyncSession, event: str, row: Checkpoint, team_id: str, key_id: str | None, /, **details: str
) -> None:
    """The same of something done with a checkpoint."""
    session.add(_row(f"checkpoint.{event}", team_id, key_id, details, row))


def _row(
    event: str, team_id: str, key_id: str | None, details: dict[str, str], about: Checkpoint | None = None
) -> AuditRow:
    return AuditRow(
        team_id=team_id,
        key_id=key_id,
        event=event,
        at=time.time(),
        details=msgspec.json.encode(details).decode(),
        run_id=None if about is None else about.run_id,
        target=None if about is None else about.target,
        name=None if about is None else about.name,
    )


async def between(
    session: AsyncSession, team_id: str, start: float, end: float, kinds: Sequence[str], limit: int
) -> Sequence[AuditEvent]:
    """A team's events with ``start <= at < end`` of the given kinds (what comes before the dot), oldest first."""
    query = select(AuditRow).where(AuditRow.team_id == team_id, AuditRow.at >= start, AuditRow.at < end)
    query = query.where(or_(false(), *(AuditRow.event.startswith(f"{kind}.") for kind in kinds)))
    return views(await session.scalars(query.order_by(AuditRow.at, AuditRow.id).limit(limit)))
