"""A client's own adapter, sent file by file, as a checkpoint: SDK 0.39 and later."""

import re
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from selfloop.control.resources.checkpoints.uploads import UploadRequest
from selfloop.server.shared.auth import CallerOf, ControlOf, public_base
from selfloop.server.shared.body import RequestBody, read_body
from selfloop.server.shared.decode import decode
from selfloop.server.tinker import names, wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.resources.runs import rfc3339
from selfloop.types.lora import LoraTargets

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)
public = APIRouter(tags=["tinker"])
"""The signed links, which need no key."""

_WITH_HEADERS = (0, 40)


@router.post("/external_weights_upload_start", openapi_extra=wire.SCHEMAS.json_body(wire.UploadStart))
async def upload_start(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """A link to PUT each file of an adapter to: what `save_weights_external` writes for such a run."""
    body = decode(await read_body(request), wire.UploadStart)
    lora = body.lora_config
    targets = LoraTargets(lora.train_attn, lora.train_mlp, lora.train_unembed).checked("lora_config")
    asked = UploadRequest(body.base_model, lora.rank, targets, body.destination_project_id)
    upload = await control.uploads.start(caller, asked)
    base = public_base(request)
    urls: dict[str, object] = {name: base + link for name, link in upload.links.items()}
    if _sdk_version(request) >= _WITH_HEADERS:
        urls = {name: {"url": url, "headers": {}} for name, url in urls.items()}
    return {"upload_id": upload.id, "urls": urls, "expires": rfc3339(upload.expires)}


@router.post("/external_weights_upload_finish", openapi_extra=wire.SCHEMAS.json_body(wire.UploadFinish))
async def upload_finish(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """Check the files and make them a checkpoint; asked again, the same one."""
    body = decode(await read_body(request), wire.UploadFinish)
    uri = names.any_path(await control.uploads.finish(caller, body.upload_id), "upload_id")
    return {"tinker_path": names.checkpoint_path(uri.run_id, uri.target, uri.name)}


@public.put("/uploads/{upload_id}/{name}", status_code=200)
async def upload_file(
    upload_id: str, name: str, request: Request, control: ControlOf, expires: int, signature: str
) -> Response:
    """One file of an upload, by its link; the body is the file."""
    await control.uploads.receive(upload_id, name, expires, signature, _parts(request))
    return Response(status_code=200)


async def _parts(request: Request) -> AsyncGenerator[bytes]:
    """The file as it comes, of any length. Raises :class:`ClientDisconnect` where it ends too soon."""
    body = RequestBody.of(request)
    async for part in body.parts():
        yield part
    if not body.is_whole:
        raise ClientDisconnect


def _sdk_version(request: Request) -> tuple[int, int]:
    """As the SDK sends it; without one, the first that had uploads."""
    sent = request.headers.get("x-stainless-package-version") or request.headers.get("user-agent", "")
    found = re.search(r"(?:^|Tinker/Python )(\d{1,4})\.(\d{1,4})\b", sent)
    return (0, 39) if found is None else (int(found[1]), int(found[2]))
