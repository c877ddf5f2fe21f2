"""Configuration, capabilities, sessions: what the client asks before and around its work."""

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from selfloop.control.resources.sessions import SessionDetails
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.decode import check_json, decode
from selfloop.server.tinker import wire
from selfloop.server.tinker.errors import RESPONSES, gone
from selfloop.types.errors import BadRequest, NotFound

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

_MAX_DETAILS_BYTES = 64 * 1024
_CONFIG_REFRESH_S = 300
_STAND_IN = (
    "The loss stable_reinforce is not published. On this server the name stands for REINFORCE corrected by the ratio "
    "of the whole sequence, cut at 2; loss_fn=importance_sampling, ppo, cispo and gspo are as published."
)
_FLAGS: dict[str, object] = {
    "custom_loss_server_side": True,
    # Keys are exchanged for tokens: the client reads from one whose it is.
    "pjwt_auth_enabled": True,
    "proto_compress_fwdbwd": True,
    "sample_join_sampling_session": True,
    "sample_use_retrieve_futures": True,
}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether requests are taken, as the Tinker client asks."""
    return {"status": "ok"}


@router.post("/client/config", openapi_extra=wire.SCHEMAS.json_body(wire.Config))
async def client_config(request: Request, caller: CallerOf) -> dict[str, object]:
    """The client's feature flags; all others are as they are by default."""
    decode(await read_body(request), wire.Config)
    return _FLAGS


@router.post("/client/dynamic_config", openapi_extra=wire.SCHEMAS.json_body(wire.Config))
async def dynamic_config(request: Request, caller: CallerOf) -> dict[str, object]:
    """The flags that the client asks for again and again."""
    decode(await read_body(request), wire.Config)
    return {"refresh_interval_sec": _CONFIG_REFRESH_S, "sample_cancel_enabled": True}


@router.get("/get_server_capabilities")
async def capabilities(caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The base models of the catalogue."""
    return {
        "supported_models": [
            {
                "model_name": model.name,
                "max_context_length": model.max_position_embeddings,
                "trainable": True,
                "sampleable": True,
            }
            for model in await control.catalogue.described()
        ]
    }


@router.post("/create_session", openapi_extra=wire.SCHEMAS.json_body(wire.CreateSession))
async def create_session(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """Open a session; what it says of itself is kept with it."""
    raw = await read_body(request)
    if len(raw) > _MAX_DETAILS_BYTES:
        raise BadRequest("user_metadata", f"a session's description of at most {_MAX_DETAILS_BYTES} bytes")
    body = decode(raw, wire.CreateSession)
    details = SessionDetails(
        tags=body.tags,
        user_metadata=strings(body.user_metadata),
        display_name=body.display_name,
        project_id=body.project_id,
        sdk_version=body.sdk_version,
    )
    row = await control.sessions.create(caller, details)
    answer: dict[str, object] = {"session_id": row.id, "type": "create_session"}
    if request.app.state.settings.stable_reinforce != "refuse":
        answer["info_message"] = _STAND_IN
    return answer


@router.post("/session_heartbeat", openapi_extra=wire.SCHEMAS.json_body(wire.Heartbeat))
async def session_heartbeat(request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """Whether the session lives; 410 ends the client's asking."""
    body = decode(await read_body(request), wire.Heartbeat)
    try:
        is_live = await control.sessions.beat(caller, body.session_id)
    except NotFound as error:
        return gone(error)
    if not is_live:
        return gone(NotFound("live session", body.session_id))
    return JSONResponse({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish", openapi_extra=wire.SCHEMAS.json_body(wire.Finish))
async def finish(session_id: str, request: Request, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """End a session: the snapshots that belong to its samplers go, runs and named checkpoints stay."""
    body = decode(await read_body(request), wire.Finish)
    await control.sessions.finish(caller, session_id, body.reason.type)
    return {"status": "ok"}


@router.post("/telemetry")
async def telemetry(request: Request, caller: CallerOf) -> dict[str, str]:
    """Taken and dropped: it may hold headers and tracebacks, and nobody here reads it."""
    raw = await read_body(request)
    await off_loop(len(raw), lambda: check_json(raw or b"{}"))
    return {"status": "accepted"}


def strings(metadata: "dict[str, object] | None") -> dict[str, str] | None:
    """Metadata as it is given back: every value a string, in JSON if it was something else."""
    if metadata is None:
        return None
    return {
        key: value if isinstance(value, str) else msgspec.json.encode(value).decode() for key, value in metadata.items()
    }
