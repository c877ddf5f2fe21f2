"""Downloads a model of ModelScope over its public API, or finds what its own client has downloaded before."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

import msgspec
from huggingface_hub.utils import httpx  # the HTTP library differs between its releases

from selfloop.convert.download import RemoteFile
from selfloop.convert.model_files import download_model
from selfloop.convert.reports import Report
from selfloop.types.errors import BadRequest, Denied, NotFound, NotReady, SelfloopError
from selfloop.types.model_folder import read_facts

_ENDPOINT = "https://modelscope.cn"
_BRANCH = "master"
_TIMEOUT_S = 60.0
_DENIED = (401, 403)
_NOT_FOUND = 404


class _File(msgspec.Struct, rename="pascal"):
    path: str
    type: str = "blob"
    size: int = 0
    sha256: str = ""
    revision: str = ""


class _Files(msgspec.Struct, rename="pascal"):
    files: list[_File] = msgspec.field(default_factory=list[_File])


class _Answer(msgspec.Struct, rename="pascal"):
    code: int = 200
    message: str = ""
    data: _Files | None = None


def cached(model_id: str) -> Path | None:
    """The folder that ModelScope's own client has of a model, if it is whole: ``MODELSCOPE_CACHE``, or its default.

    The client writes a dot in a name as three underscores, and has models in ``models`` since its version 1.17.
    """
    root = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope" / "hub")
    organisation, _, name = model_id.partition("/")
    for place in (root / "models", root, root / "hub", root / "hub" / "models"):
        for written in (name.replace(".", "___"), name):
            folder = place / organisation / written
            try:
                return read_facts(folder).path
            except (SelfloopError, OSError):
                continue
    return None


def download(model_id: str, revision: str | None, endpoint: str | None, folder: Path, report: Report) -> None:
    """Fetch tokenizer, config and safetensors of ``model_id`` into ``folder``; what is there already stays.

    Raises:
        NotFound: no such model or revision.
        Denied: it is not public.
        BadRequest: not a model that can be served.
        OperationFailed: what came is not what ModelScope says, or the disk has no room.
        NotReady: ModelScope cannot be reached.
    """
    report("find", 0.0)
    api = f"{(endpoint or _ENDPOINT).rstrip('/')}/api/v1/models/{quote(model_id)}/repo"
    of = {"Revision": revision or _BRANCH}
    try:
        files = _files(api, of, model_id)
        download_model(model_id, files, folder, {}, lambda answer: _check(answer, model_id, of), report)
    except httpx.HTTPError as error:
        raise NotReady(
            f"ModelScope cannot be reached for {model_id} ({type(error).__name__}: {error})", retry_s=60
        ) from error


def _files(api: str, of: Mapping[str, str], model_id: str) -> list[RemoteFile]:
    query = urlencode({**of, "Recursive": "True"})
    answer = httpx.get(f"{api}/files?{query}", timeout=_TIMEOUT_S, follow_redirects=True)
    _check(answer, model_id, of)
    found = _decoded(answer)
    if found.data is None:
        raise NotFound("model", f"{model_id}@{of['Revision']}", found.message or "ModelScope has no such model")
    return [
        RemoteFile(
            name=file.path,
            url=f"{api}?{urlencode({**of, 'FilePath': file.path})}",
            size=file.size,
            version=f"{file.revision}/{file.size}",
            sha256=file.sha256 or None,
        )
        for file in found.data.files
        if file.type == "blob"
    ]


def _check(answer: httpx.Response, model_id: str, of: Mapping[str, str]) -> None:
    if answer.status_code in _DENIED:
        raise Denied(f"{model_id} is not public on ModelScope: download it with its own client, and add the folder")
    if answer.status_code == _NOT_FOUND:
        raise NotFound("model", f"{model_id}@{of['Revision']}", "ModelScope has no such model or revision")
    answer.raise_for_status()


def _decoded(answer: httpx.Response) -> _Answer:
    try:
        return msgspec.json.decode(answer.content, type=_Answer)
    except msgspec.MsgspecError as error:
        raise BadRequest("base_model", f"ModelScope's list of files cannot be read: {error}") from error
