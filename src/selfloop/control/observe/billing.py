"""What a team used, hour by hour, at the prices of this installation; and its audit log."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selfloop.control.observe.usage import HOUR_S, Usage
from selfloop.control.resources.access import Caller
from selfloop.control.resources.sessions import details_of
from selfloop.storage.db import queries_audit, queries_billing, queries_resources
from selfloop.storage.db.database import Database
from selfloop.types.resources import AuditEvent, Session
from selfloop.types.settings import Prices

ProjectStorage = queries_billing.ProjectStorage
EventKind = Literal["training", "sampling_prefill", "sampling_sample", "checkpoint", "storage"]

GIGABYTE = 10**9
HOURS_A_MONTH = 720
_MAX_AUDIT = 10_000
_DAY_S = 86400


@dataclass(frozen=True, slots=True)
class BillingEvent:
    """What one key used of one thing in one hour (its start in UNIX seconds).

    Args:
        amount: tokens; saved checkpoints; or gigabyte hours.
    """

    hour: int
    kind: EventKind
    amount: float
    key_id: str
    session_id: str | None
    base_model: str | None


class Billing:
    def __init__(self, db: Database, usage: Usage, prices: Prices) -> None:
        self._db = db
        self._usage = usage
        self.prices = prices

    async def events(self, caller: Caller, start: int, end: int) -> tuple[Sequence[BillingEvent], dict[str, Session]]:
        """Usage of the caller's team in the hours from ``start`` to ``end``, and the sessions that it belongs to.

        Storage and saves are those of the checkpoints that are there now.
        """
        await self._usage.flush()
        async with self._db.read() as session:
            hours = await queries_billing.hourly(session, caller.team_id, start, end)
            stored = await queries_billing.stored_between(session, caller.team_id, start, end)
            ids = {row.session_id for row in (*hours, *stored)} - {None}
            found = {id: await queries_resources.session_row(session, str(id)) for id in ids}
        events = [
            BillingEvent(row.hour, kind, tokens, row.key_id, row.session_id, row.base_model)
            for row in hours
            for kind, tokens in _tokens(row)
            if tokens
        ]
        events += checkpoint_events(stored, start, min(end, int(time.time()) + 1))
        events.sort(key=lambda event: (event.hour, event.kind, event.session_id or ""))
        return events, {str(id): row for id, row in found.items() if row is not None}

    async def storage(self, caller: Caller, project_id: str | None) -> Sequence[ProjectStorage]:
        """What the checkpoints of the caller's team take now."""
        async with self._db.read() as session:
            rows = await queries_billing.storage_now(session, caller.team_id, time.time())
        return [row for row in rows if project_id is None or row.project_id == project_id]

    async def audit(self, caller: Caller, kinds: Sequence[str], day_start: float) -> Sequence[AuditEvent]:
        """The events of the caller's team of one day, of the given kinds (``checkpoint``, ``key``, ``session``)."""
        async with self._db.read() as session:
            return await queries_audit.between(
                session, caller.team_id, day_start, day_start + _DAY_S, kinds, _MAX_AUDIT
            )


def project_of(row: Session) -> str | None:
    return details_of(row).project_id


def _tokens(row: queries_billing.HourlyUsage) -> Sequence[tuple[EventKind, int]]:
    return (
        ("training", row.tokens_forwarded),
        ("sampling_prefill", row.tokens_prefilled),
        ("sampling_sample", row.tokens_sampled),
    )


def checkpoint_events(
    stored: Sequence[queries_billing.StoredCheckpoint], start: int, end: int
) -> Sequence[BillingEvent]:
    """Saves by their hour, and gigabyte hours by the hours that a checkpoint was there in."""
    totals: dict[tuple[int, EventKind, str, str, str], float] = {}

    def add(hour: int, kind: EventKind, row: queries_billing.StoredCheckpoint, amount: float) -> None:
        key = (hour, kind, row.key_id, row.session_id, row.base_model)
        totals[key] = totals.get(key, 0.0) + amount

    for row in stored:
        saved_in = int(row.created_at) // HOUR_S * HOUR_S
        if start <= saved_in < end:
            add(saved_in, "checkpoint", row, 1)
        until = end if row.removed_at is None else min(end, row.removed_at)
        for hour in range(max(start, saved_in), int(until) + 1, HOUR_S):
            kept_s = min(hour + HOUR_S, until) - max(hour, row.created_at)
            if kept_s > 0:
                add(hour, "storage", row, row.size_bytes / GIGABYTE * kept_s / HOUR_S)
    return [BillingEvent(hour, kind, amount, key, id, model) for (hour, kind, key, id, model), amount in totals.items()]
