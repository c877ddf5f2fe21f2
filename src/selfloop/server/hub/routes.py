"""The ``/hf`` dialect. No key is asked for: tokenizer files are public, weights only when configured."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from selfloop.server.hub.real_hub import HubUnavailable, RealHub, served_ids
from selfloop.server.shared.schemas import ErrorV1
from selfloop.types import model_folder
from selfloop.types.digests import check_file
from selfloop.types.errors import BadRequest

_MAIN = "main"
_COMMIT = re.compile("[0-9a-f]{40}")


class HubModels(Protocol):
    """The models that this server can hand out."""

    @property
    def serve_weights(self) -> bool:
        """Whether safetensors files are public, too."""
        ...

    async def folder(self, model_id: str) -> Path | None:
        """Folder of a model by name or alias, once it is prepared; None when there is no such model."""
        ...

    async def pinned(self, model_id: str, revision: str) -> Path | None:
        """Folder of a hub's model that is served at this revision; None when there is no such model."""
        ...


@dataclass(frozen=True, slots=True)
class Hub:
    """What the routes are over, as ``app.state.hub``: the models that are served here, and the hub for the rest."""

    models: HubModels
    real: RealHub


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A model folder at its one revision. ``files`` is the allow-list: nothing else is ever opened."""

    folder: Path
    sha: str
    files: tuple[str, ...]

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Repo-Commit": self.sha}


class _Refused(Exception):
    """Ends a request as the hub does, mostly with a 404."""

    def __init__(self, code: str, message: str, headers: dict[str, str] | None = None, *, status: int = 404) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers or {}
        self.status = status

    def response(self) -> Response:
        # Header values are Latin-1, and what was asked for may stand in the message.
        message = str(self).encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Error-Code": self.code, "X-Error-Message": message, **self.headers}
        return JSONResponse({"error": str(self)}, status_code=self.status, headers=headers)


class _Asked(BaseModel):
    """Of a model's information.

    Args:
        blobs: the hash of each file, too.
        expand: only these properties.
        securityStatus: what the hub's scan found; nothing is scanned here, so there is nothing more to report.
    """

    model_config = ConfigDict(extra="forbid")

    blobs: bool = False
    expand: list[str] = []
    securityStatus: bool = False


class HubError(BaseModel):
    """The body of a refusal; hub clients read its cause from the ``X-Error-Code`` header."""

    error: str


def hub_of(request: Request) -> Hub:
    return request.app.state.hub


async def _hub(request: Request) -> Hub:
    return hub_of(request)


HubOf = Annotated[Hub, Depends(_hub)]


class _HubRoute(APIRoute):
    """Hands on what is not served here, and turns this dialect's refusals into their responses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                # Before the parameters are looked at, which are then the hub's own.
                if await _is_served(request):
                    return await handler(request)
                return await hub_of(request).real.forward(request)
            except _Refused as refused:
                return refused.response()
            except HubUnavailable as error:
                return _Refused(error.code, str(error), status=error.status).response()

        return handle


async def _is_served(request: Request) -> bool:
    own = request.path_params.get("model_id")
    revision = request.path_params.get("revision")
    if own is not None and revision is not None and await hub_of(request).models.pinned(own, revision) is not None:
        return True
    ids = served_ids(request.path_params["path"]) if own is None else [own]
    return any([await hub_of(request).models.folder(id) is not None for id in ids])


_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": HubError | ErrorV1, "description": "Not served"}}

router = APIRouter(prefix="/hf", tags=["hub"], route_class=_HubRoute, responses=_ERRORS)
"""What is not of the models that are served here is asked of the real hub. An id has one segment or more."""


@router.get("/api/models/{model_id:path}/tree/{revision}")
async def tree(model_id: str, revision: str, hub: HubOf, recursive: bool = False, expand: bool = False) -> Response:
    """The files of a model: all of them either way, as it has no folders, and all that is known of each."""
    snapshot = await _snapshot(hub.models, model_id, revision)
    return JSONResponse(await asyncio.to_thread(_entries, snapshot), headers=snapshot.headers)


@router.get("/api/models/{model_id:path}/tree/{revision}/{folder:path}")
async def subtree(
    model_id: str, revision: str, folder: str, hub: HubOf, recursive: bool = False, expand: bool = False
) -> Response:
    """Always EntryNotFound: a served model has no folders."""
    snapshot = await _snapshot(hub.models, model_id, revision)
    raise _Refused("EntryNotFound", "no such folder", snapshot.headers)


@router.get("/api/models/{model_id:path}/revision/{revision}")
async def model_at_revision(model_id: str, revision: str, asked: Annotated[_Asked, Query()], hub: HubOf) -> Response:
    """What a model holds, at ``main``, at its sha, or at the revision that it was added at."""
    snapshot = await _snapshot(hub.models, model_id, revision)
    info = await asyncio.to_thread(_model_info, model_id, snapshot, asked.blobs)
    return JSONResponse(_expanded(info, asked.expand), headers=snapshot.headers)


@router.get("/api/models/{model_id:path}")
async def model(model_id: str, asked: Annotated[_Asked, Query()], hub: HubOf) -> Response:
    """What a model holds."""
    return await model_at_revision(model_id, _MAIN, asked, hub)


@router.head("/{model_id:path}/resolve/{revision}/{file:path}", include_in_schema=False)
@router.get("/{model_id:path}/resolve/{revision}/{file:path}")
async def resolve(model_id: str, revision: str, file: str, hub: HubOf, download: bool = False) -> Response:
    """One file of a model; ``Range`` is honoured. With ``download`` a browser stores it."""
    snapshot = await _snapshot(hub.models, model_id, revision)
    if file not in snapshot.files:
        raise _Refused("EntryNotFound", "no such file", snapshot.headers)
    await asyncio.to_thread(check_file, snapshot.folder, file)
    etag = await asyncio.to_thread(_etag, snapshot.folder / file)
    headers = {**snapshot.headers, "ETag": f'"{etag}"'}
    return FileResponse(snapshot.folder / file, headers=headers, filename=Path(file).name if download else None)


@router.head("/{path:path}", include_in_schema=False)
@router.get("/{path:path}", summary="Anything else of the real hub.")
@router.post("/{path:path}", summary="Anything else of the real hub.")
async def rest(path: str) -> Response:
    """Handed on to the hub that `--hub-url` names, unless it is about a model that is served here."""
    raise _Refused("EntryNotFound", f"/{path}: of a served model there are its information, its tree and its files")


async def _snapshot(models: HubModels, model_id: str, revision: str) -> _Snapshot:
    folder = await models.folder(model_id)
    snapshot = None if folder is None else await asyncio.to_thread(_read_snapshot, folder, models.serve_weights)
    if snapshot is not None and revision in (_MAIN, snapshot.sha):
        return snapshot
    if (pinned := await models.pinned(model_id, revision)) is not None:
        at_revision = await asyncio.to_thread(_read_snapshot, pinned, models.serve_weights)
        # Asked for by its commit, it has that one: clients keep files by it.
        return replace(at_revision, sha=revision) if _COMMIT.fullmatch(revision) else at_revision
    if snapshot is None:
        raise _Refused("RepoNotFound", "no such model")
    raise _Refused("RevisionNotFound", "no such revision", snapshot.headers)


def _read_snapshot(folder: Path, serve_weights: bool) -> _Snapshot:
    files = model_folder.tokenizer_files(folder)
    if serve_weights:
        files = sorted([*files, *model_folder.weight_files(folder)])
    return _Snapshot(folder, model_folder.snapshot_sha(folder), tuple(files))


def _etag(file: Path) -> str:
    if file.suffix == ".safetensors":
        return model_folder.weights_tag(file)
    return model_folder.content_hash(file)


def _entries(snapshot: _Snapshot) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)[:40]}
        for name, file in ((name, snapshot.folder / name) for name in snapshot.files)
    ]


def _model_info(model_id: str, snapshot: _Snapshot, with_blobs: bool) -> dict[str, Any]:
    siblings = [{"rfilename": name, "size": (snapshot.folder / name).stat().st_size} for name in snapshot.files]
    if with_blobs:
        siblings = [{**one, "blobId": _etag(snapshot.folder / str(one["rfilename"]))[:40]} for one in siblings]
    return {
        "id": model_id,
        "modelId": model_id,
        "sha": snapshot.sha,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def _expanded(info: dict[str, Any], properties: list[str]) -> dict[str, Any]:
    """Only what ``expand`` names, where it names anything. Raises :class:`BadRequest` for what is not known here."""
    unknown = [name for name in properties if name not in info]
    if unknown:
        raise BadRequest("expand", f"of {', '.join(sorted(info))}; got {unknown[0][:100]!r}")
    return {name: info[name] for name in ("id", *properties)} if properties else info
