"""Sessions listed, put into projects, and exported as traces."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from selfloop.control.resources.listings import Page
from selfloop.control.resources.sessions import details_of
from selfloop.server.shared.auth import CallerOf, ControlOf, public_base
from selfloop.server.shared.body import read_body
from selfloop.server.shared.decode import decode
from selfloop.server.tinker import names, wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.resources.runs import AccessScope, Limit, Offset
from selfloop.types.errors import BadRequest, OperationFailed

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

Json = dict[str, object]
_MAX_PROJECT = 200


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
