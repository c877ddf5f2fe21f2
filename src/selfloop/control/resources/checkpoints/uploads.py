"""Uploads: an adapter that a client sends file by file to signed links, and that then becomes a checkpoint.

What is known of an upload lies beside its files, so that it goes on over a restart. All of it goes after its time.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from selfloop.control.data_dir.signed_urls import LINK_LIFE_S, SignedUrls
from selfloop.control.resources.access import Caller
from selfloop.control.resources.catalogue import Catalogue
from selfloop.control.resources.checkpoints.imports import Imports, Owner
from selfloop.control.resources.runs import MAX_LORA_RANK
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.types.errors import BadRequest, Conflict, NotFound, OperationFailed, TooLarge
from selfloop.types.ids import new_id
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import save_bytes, with_experts

_FOLDER = "uploads"
_RECORD = "upload.json"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 256 * 1024
# Of a team at a time: each may take what an adapter takes.
_MAX_OPEN = 16


class _Record(msgspec.Struct):
    team_id: str
    key_id: str
    base_model: str
    rank: int
    targets: str
    project_id: str | None
    expires: int
    max_bytes: dict[str, int]
    uri: str | None = None


class _Adapter(msgspec.Struct):
    r: int
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """The adapter that will be sent: what ``save_weights_external`` writes for such a run."""

    base_model: str
    rank: int
    targets: LoraTargets
    project_id: str | None


@dataclass(frozen=True, slots=True)
class Upload:
    """``links`` are paths below the server's address, by file; ``expires`` in UNIX seconds."""

    id: str
    links: dict[str, str]
    expires: int


class Uploads:
    def __init__(self, imports: Imports, catalogue: Catalogue, blobs: LocalBlobs, links: SignedUrls) -> None:
        self._imports = imports
        self._catalogue = catalogue
        self._root = blobs.path(_FOLDER)
        self._signed_urls = links
        self._finishing: dict[str, asyncio.Lock] = {}

    async def start(self, caller: Caller, request: UploadRequest) -> Upload:
        """Give a link to send each file to.

        Raises:
            NotFound: no such base model.
            BadRequest: a rank that is not served.
            Conflict: the team has too many uploads under way.
        """
        model = await self._catalogue.resolve(request.base_model, "base_model")
        if not 1 <= request.rank <= MAX_LORA_RANK:
            raise BadRequest("lora_config.rank", f"1 to {MAX_LORA_RANK}, got {request.rank}")
        folder = await self._catalogue.folder(model.name)
        if folder is None:
            raise NotFound("base model", request.base_model, "its files are not here yet")
        targets = await asyncio.to_thread(with_experts, folder, request.targets)
        weights_bytes = await asyncio.to_thread(save_bytes, folder, request.rank, targets, with_optimizer=False)
        record = _Record(
            team_id=caller.team_id,
            key_id=caller.key_id,
            base_model=model.name,
            rank=request.rank,
            targets=str(request.targets),
            project_id=request.project_id,
            expires=int(time.time()) + LINK_LIFE_S,
            max_bytes={_CONFIG: _MAX_CONFIG_BYTES, _WEIGHTS: weights_bytes},
        )
        id = new_id() + new_id()
        await asyncio.to_thread(self._make, id, record)
        links: dict[str, str] = {}
        for name in record.max_bytes:
            expires, signature = self._signed_urls.sign("upload", id, name)
            links[name] = f"/uploads/{id}/{name}?expires={expires}&signature={signature}"
        return Upload(id, links, record.expires)

    async def receive(self, id: str, name: str, expires: int, signature: str, body: AsyncIterator[bytes]) -> int:
        """Take one file by its link; sent again it replaces what was sent before. Returns its size.

        Raises:
            Denied: the link is not valid, or has expired.
            NotFound: the upload is over.
            Conflict: it is being finished, or is finished.
            TooLarge: longer than an adapter of that rank can be.
        """
        self._signed_urls.check("upload", id, name, expires, signature)
        record = await asyncio.to_thread(self._read, id)
        if record is None or name not in record.max_bytes:
            raise NotFound("upload", id)
        if record.uri is not None or id in self._finishing:
            raise Conflict(f"upload {id} is finished, or about to be")
        limit = record.max_bytes[name]
        aside = self._root / id / f".{new_id()}"
        size = 0
        try:
            with await asyncio.to_thread(aside.open, "xb") as file:
                async for part in body:
                    size += len(part)
                    if size > limit:
                        raise TooLarge(name, limit, f"bytes, the most that an adapter of rank {record.rank} has")
                    await asyncio.to_thread(file.write, part)
                await asyncio.to_thread(_sync, file)
            await asyncio.to_thread(aside.replace, self._root / id / name)
        except FileNotFoundError:
            raise NotFound("upload", id) from None
        finally:
            aside.unlink(missing_ok=True)
        return size

    async def finish(self, caller: Caller, id: str) -> str:
        """Check the files as :class:`Imports` does, and make them a checkpoint; asked again, the same one.

        Returns:
            The checkpoint's ``bt://`` URI.

        Raises:
            NotFound: no such upload of the caller's team, or its time is over.
            BadRequest: a file is missing, or the files are not the adapter that was announced.
            OperationFailed: they are no adapter of that base model.
        """
        record = await asyncio.to_thread(self._read, id)
        if record is None or record.team_id != caller.team_id:
            raise NotFound("upload", id)
        lock = self._finishing.setdefault(id, asyncio.Lock())
        try:
            async with lock:
                return await self._finish(id)
        finally:
            if not lock.locked():
                self._finishing.pop(id, None)

    async def _finish(self, id: str) -> str:
        record = await asyncio.to_thread(self._read, id)
        if record is None:
            raise NotFound("upload", id)
        if record.uri is not None:
            return record.uri
        folder = self._root / id
        missing = [name for name in record.max_bytes if not (folder / name).is_file()]
        if missing:
            raise BadRequest("upload_id", f"one whose files have all been sent; {', '.join(missing)} was not")
        _check_config(await asyncio.to_thread((folder / _CONFIG).read_bytes), record)
        try:
            imported = await self._imports.add_owned(
                folder,
                Owner(record.team_id, record.key_id, record.project_id),
                base_model=record.base_model,
                name="uploaded",
                on_progress=lambda _stage, _done: None,
            )
        except (BadRequest, OperationFailed) as error:
            # Of files that the client knows by their names, in a folder that is none of its business.
            raise OperationFailed(str(error).replace(f"{folder}/", "").replace(str(folder), "the upload")) from error
        record.uri = imported.uri
        await asyncio.to_thread(self._write, id, record)
        for name in record.max_bytes:
            await asyncio.to_thread((folder / name).unlink, missing_ok=True)
        return imported.uri

    def clear_expired(self) -> None:
        """Delete the files of uploads whose time is over."""
        for folder in self._root.iterdir() if self._root.is_dir() else ():
            if self._read(folder.name) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _make(self, id: str, record: _Record) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self.clear_expired()
        known = [self._read(folder.name) for folder in self._root.iterdir()]
        open_now = sum(r is not None and r.team_id == record.team_id and r.uri is None for r in known)
        if open_now >= _MAX_OPEN:
            raise Conflict(f"{_MAX_OPEN} uploads of this team are under way; finish them, or wait until they expire")
        (self._root / id).mkdir()
        self._write(id, record)

    def _read(self, id: str) -> _Record | None:
        """None for one that is not there, is over, or never was whole."""
        if not id.isalnum():
            return None
        try:
            record = msgspec.json.decode((self._root / id / _RECORD).read_bytes(), type=_Record)
        except (OSError, msgspec.MsgspecError):
            return None
        return None if record.expires < time.time() else record

    def _write(self, id: str, record: _Record) -> None:
        aside = self._root / id / f".{new_id()}"
        with aside.open("xb") as file:
            file.write(msgspec.json.encode(record))
            _sync(file)
        aside.replace(self._root / id / _RECORD)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_config(content: bytes, record: _Record) -> None:
    try:
        adapter = msgspec.json.decode(content, type=_Adapter)
    except msgspec.MsgspecError as error:
        raise BadRequest("upload_id", f"an upload whose {_CONFIG} is one of PEFT's: {error}") from None
    if adapter.r != record.rank:
        raise BadRequest("lora_config.rank", f"the rank in {_CONFIG}, {adapter.r}; {record.rank} was announced")
    parts = LoraTargets.parse(record.targets)
    named = adapter.target_modules if isinstance(adapter.target_modules, list) else []
    # Weights are named by their modules, stacks of experts by their own names.
    named = [name.removesuffix(".weight").rpartition(".")[2] for name in (*named, *(adapter.target_parameters or []))]
    for part, modules in _MODULES.items():
        if not getattr(parts, part) and (wrong := sorted(set(named) & modules)):
            raise BadRequest(f"lora_config.train_{part}", f"true, as {_CONFIG} adapts {', '.join(wrong)}")


_MODULES = {
    "attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "gate_up_proj"},
    "unembed": {"lm_head"},
}
