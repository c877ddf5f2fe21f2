"""The key itself, the audit log, and what was used."""

from datetime import UTC, date, datetime
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response

from selfloop.control.observe.billing import GIGABYTE, HOURS_A_MONTH, BillingEvent, project_of
from selfloop.control.observe.usage import HOUR_S
from selfloop.control.resources.sessions import details_of
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import read_body
from selfloop.server.tinker import names
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.resources.runs import rfc3339
from selfloop.types.errors import BadRequest
from selfloop.types.resources import AuditEvent
from selfloop.types.settings import Prices
from selfloop.types.status import CheckpointTarget

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

Json = dict[str, object]
_MAX_WINDOW_S = 14 * 86400
_ID_BASE = 36
_AUDIT_KINDS = {
    "all": ("checkpoint", "key", "session"),
    "checkpoints": ("checkpoint",),
    "projects": ("session",),
    "teams": (),
    "organizations": ("key",),
}


@router.get("/auth/apikey/me")
async def own_key(caller: CallerOf, control: ControlOf) -> Json:
    """The key that the request was sent with, and its team."""
    (team,) = await control.access.teams_of(caller)
    details = {"org_details": {"name": team.name}, "user_details": {"email": caller.key_name}}
    return {
        # The client wants a number: the id, read as one.
        "key_id": int(caller.key_id, _ID_BASE),
        "name": caller.key_name,
        "note": f"key {caller.key_id}, {caller.role}",
        "details": details,
    }


@router.delete("/auth/apikey/me", status_code=204)
async def revoke_own_key(caller: CallerOf, control: ControlOf) -> Response:
    """Revoke the key that the request was sent with."""
    await control.access.revoke_key(caller.key_id, by=caller)
    return Response(status_code=204)


@router.post("/auth/token")
async def token(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """A token in exchange for the key: it stands for it for a day, and says whose it is."""
    await read_body(request)
    return {"jwt": await control.access.token(caller)}


@router.get("/audit")
async def audit(
    caller: CallerOf,
    control: ControlOf,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> Json:
    """What was done in the caller's team on a day (UTC) with checkpoints, sessions' projects and keys."""
    day = day or datetime.now(UTC).date()
    start = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    rows = await control.billing.audit(caller, _AUDIT_KINDS[event_type], start)
    return {"entries": [_entry(row, control.access.name_of(row.key_id or "")) for row in rows]}


@router.get("/billing/usage/events")
async def usage_events(caller: CallerOf, control: ControlOf, starting_on: datetime, ending_before: datetime) -> Json:
    """The team's tokens, saves and stored bytes by the hour, at the prices that the server was started with."""
    start, end = _hour("starting_on", starting_on), _hour("ending_before", ending_before)
    if not 0 < end - start <= _MAX_WINDOW_S:
        raise BadRequest("ending_before", "a time after starting_on, at most 14 days later")
    events, sessions = await control.billing.events(caller, start, end)
    projects = {id: project_of(row) for id, row in sessions.items()}
    prices = control.billing.prices
    return {
        "data": [
            _event(event, prices, control.access.name_of(event.key_id), projects.get(event.session_id or ""))
            for event in events
        ],
        "sessions": {id: {"user_metadata": details_of(row).user_metadata} for id, row in sessions.items()},
        "cost_data_through": rfc3339(end),
    }


@router.get("/billing/usage/checkpoints/current")
async def checkpoint_storage(caller: CallerOf, control: ControlOf, project_id: str | None = None) -> Json:
    """What the team's checkpoints take now, by project and key."""
    rate = control.billing.prices.usd_per_gigabyte_month
    data: list[Json] = []
    for row in await control.billing.storage(caller, project_id):
        gigabytes = row.size_bytes / GIGABYTE
        data.append(
            {
                "project_id": row.project_id,
                "org_user_urn": f"selfloop:key:{row.key_id}",
                "user_name": control.access.name_of(row.key_id),
                "checkpoint_count": row.num_checkpoints,
                "size_bytes": row.size_bytes,
                "size_gigabytes": gigabytes,
                "estimated_monthly_cost_usd": gigabytes * rate,
            }
        )
    return {"effective_rate_usd_per_gigabyte_month": rate, "data": data}


def _hour(field: str, at: datetime) -> int:
    if at.tzinfo is None:
        raise BadRequest(field, "a time with its zone, e.g. 2026-07-13T00:00:00Z")
    seconds = int(at.timestamp())
    if seconds % HOUR_S or seconds < 0 or at.microsecond:
        raise BadRequest(field, "a full hour in UTC, e.g. 2026-07-13T00:00:00Z")
    return seconds


def _entry(row: AuditEvent, key_name: str | None) -> Json:
    details: Json = {**msgspec.json.decode(row.details, type=dict[str, str]), "by": key_name or "command line"}
    entry: Json = {"timestamp": rfc3339(row.at), "event": row.event, "event_details": details}
    if row.run_id is not None:
        entry["model_id"] = names.their_id(row.run_id)
        if row.target is not None and row.name is not None:
            entry["tinker_path"] = names.checkpoint_path(row.run_id, CheckpointTarget(row.target), row.name)
    return entry


def _event(event: BillingEvent, prices: Prices, key_name: str | None, project_id: str | None) -> Json:
    shown: Json = {
        "bucket_start": rfc3339(event.hour),
        "bucket_end": rfc3339(event.hour + HOUR_S),
        "base_model": event.base_model,
        "user_id": event.key_id,
        "user_name": key_name,
        "session_id": event.session_id,
        "project_id": project_id,
    }
    info: Json = {"type": event.kind}
    if event.kind == "storage":
        rate = prices.usd_per_gigabyte_month
        info |= {"gigabyte_hours": event.amount, "free": rate == 0}
        shown |= {
            "effective_rate_usd_per_gigabyte_month": rate,
            "estimated_cost_usd": rate * event.amount / HOURS_A_MONTH,
        }
    elif event.kind == "checkpoint":
        info["count"] = int(event.amount)
    else:
        rate = prices.usd_per_million_tokens
        info["token_count"] = int(event.amount)
        if event.kind == "sampling_prefill":
            info["cached"] = False
        shown |= {"effective_rate_usd_per_million_tokens": rate, "estimated_cost_usd": rate * event.amount / 1e6}
    return shown | {"event_info": info}
