"""Sessions and checkpoints of the caller's team, searched; newest first, a page at a time."""

from collections.abc import Sequence
from datetime import datetime
from typing import TypeVar

from fastapi import APIRouter, Request

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.listings import NO_PROJECT, CheckpointSearch, FoundSession, SessionSearch
from selfloop.control.resources.sessions import SILENT, details_of
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import read_body
from selfloop.server.shared.decode import decode
from selfloop.server.tinker import wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.resources.runs import checkpoint, rfc3339, target_of_type
from selfloop.types.errors import BadRequest
from selfloop.types.resources import Session

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

T = TypeVar("T")
Json = dict[str, object]
_MAX_SESSIONS = 200
_MAX_CHECKPOINTS = 1000
_MAX_OWNERS = 10
_URN = "selfloop:key:"


@router.post("/checkpoints/search", openapi_extra=wire.SCHEMAS.json_body(wire.SearchCheckpoints))
async def search_checkpoints(request: Request, caller: CallerOf, control: ControlOf) -> Json:
    """Checkpoints of the caller's team that match, newest first."""
    body = decode(await read_body(request), wire.SearchCheckpoints)
    _check_limit(body.limit, _MAX_CHECKPOINTS)
    cursor = body.cursor
    found = await control.listings.search_checkpoints(
        CheckpointSearch(
            team_id=caller.team_id,
            limit=body.limit,
            project_ids=body.project_ids,
            user_metadata=body.user_metadata,
            target=None if body.checkpoint_type is None else target_of_type(body.checkpoint_type),
            key_ids=_key_ids(body.owner, caller),
            base_models=body.base_models,
            after=None if cursor is None else (_at(cursor.last_created_at), cursor.last_checkpoint_id),
        )
    )
    last = _last(found, body.limit)
    return {
        "checkpoints": [checkpoint(row) for row in found],
        "next_cursor": None if last is None else _cursor(last.created_at, last_checkpoint_id=last.id),
    }


@router.post("/sessions/search", openapi_extra=wire.SCHEMAS.json_body(wire.SearchSessions))
async def search_sessions(request: Request, caller: CallerOf, control: ControlOf) -> Json:
    """Sessions of the caller's team that match, newest first."""
    body = decode(await read_body(request), wire.SearchSessions)
    _check_limit(body.limit, _MAX_SESSIONS)
    cursor = body.cursor
    found = await control.listings.search(
        SessionSearch(
            team_id=caller.team_id,
            limit=body.limit,
            session_id=body.session_id,
            display_name=body.display_name,
            project_ids=body.project_ids,
            user_metadata=body.user_metadata,
            key_ids=_key_ids(body.owner, caller),
            states=_states(body),
            after=None if cursor is None else (_at(cursor.last_created_at), cursor.last_session_id),
        )
    )
    last = _last(found, body.limit)
    return {
        "sessions": [_summary(each, control) for each in found],
        "next_cursor": None if last is None else _cursor(last.session.created_at, last_session_id=last.session.id),
    }


def _check_limit(limit: int, most: int) -> None:
    if not 1 <= limit <= most:
        raise BadRequest("limit", f"1 to {most}, got {limit}")


def _at(last_created_at: datetime) -> float:
    """Of a cursor, in UNIX seconds."""
    if last_created_at.tzinfo is None:
        raise BadRequest("cursor.last_created_at", "a time with its zone")
    return last_created_at.timestamp()


def _last(found: Sequence[T], limit: int) -> T | None:
    """What the next page comes after; None for the last page."""
    return found[-1] if len(found) == limit else None


def _cursor(created_at: float, **last_id: str) -> Json:
    return {"last_created_at": rfc3339(created_at), **last_id}


def _key_ids(owner: wire.Owner, caller: Caller) -> list[str] | None:
    """The keys that a search is of, None for the whole team's."""
    match owner:
        case wire.OwnSessions():
            return [caller.key_id]
        case wire.AccessibleSessions():
            return None
        case wire.SessionsOf(owner_urns=urns):
            if not 1 <= len(urns) <= _MAX_OWNERS:
                raise BadRequest("owner.owner_urns", f"1 to {_MAX_OWNERS} owners")
            if any(not urn.startswith(_URN) for urn in urns):
                raise BadRequest("owner.owner_urns", f"{_URN}<key id>, as the `owner` of a session that was found")
            return [urn.removeprefix(_URN) for urn in urns]


def _states(body: wire.SearchSessions) -> list[str] | None:
    """Here a session is active, finished by its client, or cancelled for its client's silence; none fails."""
    if body.statuses is None:
        return None
    states: list[str] = []
    for status in body.statuses:
        match status:
            case wire.ActiveSessions():
                states.append("active")
            case wire.FinishedSessions(reasons=reasons):
                states += ["success", "errored", "interrupted"] if reasons is None else reasons
            case wire.CancelledSessions():
                states.append(SILENT)
            case wire.FailedSessions():
                pass
    return states


def _summary(found: FoundSession, control: Control) -> Json:
    row, details = found.session, details_of(found.session)
    return {
        "session_id": row.id,
        "created_at": rfc3339(row.created_at),
        "owner": f"{_URN}{row.key_id}",
        "project_id": details.project_id or NO_PROJECT,
        "status": _status(row),
        "checkpoints_count": found.totals.num_checkpoints,
        "display_name": details.display_name,
        "user_metadata": details.user_metadata,
        "checkpoint_storage_bytes": found.totals.size_bytes,
    }


def _status(row: Session) -> Json:
    if row.end_reason is None:
        return {"type": "active"}
    if row.end_reason == SILENT:
        return {"type": "cancelled", "detail": "no heartbeat of its client"}
    return {"type": "client_finished", "reason": {"type": row.end_reason}}
