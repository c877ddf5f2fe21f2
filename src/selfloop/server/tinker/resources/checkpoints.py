"""One checkpoint: described, deleted, published, given a time to live, downloaded, copied."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from selfloop.control.data_dir.signed_urls import LINK_LIFE_S
from selfloop.control.resources.checkpoints.sharing import Address, CopyRequest
from selfloop.server.shared.auth import CallerOf, ControlOf, public_base
from selfloop.server.shared.body import read_body
from selfloop.server.shared.decode import decode
from selfloop.server.tinker import names, validate, wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.resources.runs import rfc3339
from selfloop.server.tinker.validate import granted_team
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.lora import LoraTargets
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import is_checkpoint_name

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
_MAX_KEY = 200


@router.delete(_CHECKPOINT, status_code=204)
async def delete_checkpoint(run_id: str, kind: str, name: str, caller: CallerOf, control: ControlOf) -> Response:
    """Refused while a live sampler or a queued operation needs it."""
    await control.sharing.delete(caller, _address(run_id, kind, name))
    return Response(status_code=204)


@router.post(_CHECKPOINT + "/publish", status_code=204)
async def publish(run_id: str, kind: str, name: str, caller: CallerOf, control: ControlOf) -> Response:
    """Let every key of this server read the checkpoint. Doing it twice is fine."""
    await control.sharing.set_public(caller, _address(run_id, kind, name), True)
    return Response(status_code=204)


@router.delete(_CHECKPOINT + "/publish", status_code=204)
async def unpublish(run_id: str, kind: str, name: str, caller: CallerOf, control: ControlOf) -> Response:
    """Let its own team alone read it again; copies and samplers that others made of it stay theirs."""
    await control.sharing.set_public(caller, _address(run_id, kind, name), False)
    return Response(status_code=204)


@router.put(_CHECKPOINT + "/ttl", status_code=204, openapi_extra=wire.SCHEMAS.json_body(wire.SetTtl))
async def set_ttl(
    run_id: str, kind: str, name: str, request: Request, caller: CallerOf, control: ControlOf
) -> Response:
    """Let the checkpoint expire so many seconds from now, or never."""
    body = decode(await read_body(request), wire.SetTtl)
    await control.sharing.set_ttl(caller, _address(run_id, kind, name), validate.ttl_seconds(body.ttl_seconds))
    return Response(status_code=204)


@router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
async def external_weights_urls(
    run_id: str, name: str, request: Request, caller: CallerOf, control: ControlOf
) -> dict[str, object]:
    """A link to each file, which needs no key and lasts an hour."""
    address = _address(run_id, names.folder(CheckpointTarget.EXTERNAL), name)
    id, files = await control.sharing.links(caller, address)
    base = public_base(request)
    urls: dict[str, str] = {}
    until = datetime.now(UTC).timestamp() + LINK_LIFE_S
    for file in files:
        urls[file.name], expires = control.checkpoints.link(id, file.name, base)
        until = min(until, expires)
    return {"urls": urls, "expires": rfc3339(until)}


@router.post("/weights_info", openapi_extra=wire.SCHEMAS.json_body(wire.WeightsInfo))
async def weights_info(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """What a checkpoint adapts."""
    body = decode(await read_body(request), wire.WeightsInfo)
    row = await control.sharing.readable(caller, _parsed(body.tinker_path, "tinker_path"))
    targets = LoraTargets.parse(row.targets)
    return {
        "base_model": row.base_model,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": row.lora_rank,
        "train_unembed": targets.unembed,
        "train_mlp": targets.mlp,
        "train_attn": targets.attn,
    }


@router.post("/copy_weights", openapi_extra=wire.SCHEMAS.json_body(wire.CopyWeights))
async def copy_weights(
    request: Request,
    caller: CallerOf,
    control: ControlOf,
    x_idempotency_key: Annotated[str | None, Header()] = None,
    x_tinker_weights_access_token: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """A checkpoint of the caller's own with the same files, under a run that is not trained."""
    body = decode(await read_body(request), wire.CopyWeights)
    if x_idempotency_key is not None and not 1 <= len(x_idempotency_key) <= _MAX_KEY:
        raise BadRequest("X-Idempotency-Key", f"1 to {_MAX_KEY} characters")
    run_id = None
    if (body.session_id is None) != (body.model_seq_id is None):
        raise BadRequest("session_id/model_seq_id", "both, for the copy's run, or neither")
    if body.session_id is not None and body.model_seq_id is not None:
        if body.destination_project_id is not None:
            raise BadRequest("destination_project_id", "null with a session_id: the run is in the session's project")
        session = await control.sessions.get(caller, body.session_id)
        run_id = names.new_run_id(session.id, body.model_seq_id)
    copy = await control.sharing.copy(
        caller,
        CopyRequest(
            source=_parsed(body.source_path, "source_path"),
            ttl_seconds=validate.ttl_seconds(body.ttl_seconds),
            request_key=x_idempotency_key,
            granted_team_id=await granted_team(control, x_tinker_weights_access_token or body.weights_access_token),
            session_id=body.session_id,
            run_id=run_id,
            project_id=body.destination_project_id,
        ),
    )
    return {"tinker_path": names.checkpoint_path(copy.run_id, CheckpointTarget(copy.target), copy.name)}


def _address(run_id: str, kind: str, name: str) -> Address:
    target = names.target_of(kind, "checkpoint_id")
    written = f"tinker://{run_id}/{kind}/{name}"
    if not is_checkpoint_name(name):
        raise NotFound("checkpoint", written[:300])
    return Address(names.run_id(run_id), target, name, written)


def _parsed(path: str, field: str) -> Address:
    uri = names.any_path(path, field)
    return Address(uri.run_id, uri.target, uri.name, path)
