"""Sessions listed, searched, put into projects, and exported as traces."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.listings import NO_PROJECT, FoundSession, Page, SessionSearch
from selfloop.control.resources.sessions import SILENT, Session, details_of
from selfloop.server.shared.auth import CallerOf, ControlOf, public_base
from selfloop.server.shared.body import read_body
from selfloop.server.shared.decode import decode
from selfloop.server.tinker import names, wire
from selfloop.server.tinker.http import ERRORS, TinkerRoute
from selfloop.server.tinker.runs import AccessScope, Limit, Offset, rfc3339
from selfloop.types.errors import BadRequest, OperationFailed

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=TinkerRoute, responses=ERRORS)

Json = dict[str, object]
_MAX_SEARCH = 200
_MAX_OWNERS = 10
_MAX_PROJECT = 200
_URN = "selfloop:key:"


@router.get("/sessions")
async def list_sessions(
    caller: CallerOf, control: ControlOf, limit: Limit = 20, offset: Offset = 0, access_scope: AccessScope = "owned"
) -> dict[str, list[str]]:
    """Sessions of the caller's key, newest first; `accessible` means the team's."""
    rows = await control.listings.sessions(caller, Page(limit, offset), accessible=access_scope == "accessible")
    return {"sessions": [row.id for row in rows]}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str,
    caller: CallerOf,
    control: ControlOf,
    access_scope: Annotated[AccessScope, Query(description="Either: a session is its team's, and is not shared.")] = (
        "owned"
    ),
) -> Json:
    """The runs and samplers of a session."""
    row = await control.sessions.get(caller, session_id)
    runs, samplers = await control.listings.of_session(caller, session_id)
    details = details_of(row)
    return {
        "training_run_ids": [names.their_id(id) for id in runs],
        "sampler_ids": [names.their_id(id) for id in samplers],
        "user_metadata": details.user_metadata,
        "display_name": details.display_name,
    }


@router.put("/sessions/{session_id}/project", status_code=204, openapi_extra=wire.SCHEMAS.json_body(wire.AssignProject))
async def assign_project(session_id: str, request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """A project is a word that sessions and their runs are listed by."""
    body = decode(await read_body(request), wire.AssignProject)
    if not 1 <= len(body.project_id) <= _MAX_PROJECT:
        raise BadRequest("project_id", f"1 to {_MAX_PROJECT} characters")
    await control.sessions.assign_project(caller, session_id, body.project_id)
    return Response(status_code=204)


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(session_id: str, request: Request, caller: CallerOf, control: ControlOf) -> Json:
    """A timeline of the session's operations and log lines, in Chrome's trace format, which Perfetto opens."""
    session = await control.sessions.get(caller, session_id)
    try:
        file = await control.traces.export(caller, session)
    except OperationFailed as error:
        return {"status": "failed", "error": str(error)}
    query = f"expires={file.expires}&signature={file.signature}"
    return {"status": "ready", "url": f"{public_base(request)}/debug_archives/{file.archive_id}/{file.name}?{query}"}


@router.post("/sessions/search", openapi_extra=wire.SCHEMAS.json_body(wire.SearchSessions))
async def search_sessions(request: Request, caller: CallerOf, control: ControlOf) -> Json:
    """Sessions of the caller's team that match, newest first."""
    body = decode(await read_body(request), wire.SearchSessions)
    if not 1 <= body.limit <= _MAX_SEARCH:
        raise BadRequest("limit", f"1 to {_MAX_SEARCH}, got {body.limit}")
    after = None
    if body.cursor is not None:
        if body.cursor.last_created_at.tzinfo is None:
            raise BadRequest("cursor.last_created_at", "a time with its zone")
        after = (body.cursor.last_created_at.timestamp(), body.cursor.last_session_id)
    found = await control.listings.search(
        SessionSearch(
            team_id=caller.team_id,
            limit=body.limit,
            session_id=body.session_id,
            display_name=body.display_name,
            project_ids=body.project_ids,
            user_metadata=body.user_metadata,
            key_ids=key_ids(body.owner, caller),
            states=_states(body),
            after=after,
        )
    )
    last = found[-1].session if len(found) == body.limit else None
    return {
        "sessions": [_summary(each, control) for each in found],
        "next_cursor": None
        if last is None
        else {"last_created_at": rfc3339(last.created_at), "last_session_id": last.id},
    }


def key_ids(owner: wire.Owner, caller: Caller) -> list[str] | None:
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
