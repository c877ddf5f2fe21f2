"""Exports: a checkpoint as a folder that the rest of the world reads."""

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from selfloop.control.capacity.subprocesses import run_subprocess
from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.blobs.local import sync_directory
from selfloop.storage.db import queries_checkpoints
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest, Conflict, NotFound, OperationFailed
from selfloop.types.ids import is_id, new_id
from selfloop.types.model_folder import read_facts, tokenizer_files
from selfloop.types.resources import Checkpoint
from selfloop.types.uris import parse_checkpoint_uri
from selfloop.worker.launchers.conversions import launch_adapters

Format = Literal["peft", "merged", "gguf"]
GgufDtype = Literal["f32", "f16", "bf16"]

_SPARE_BYTES = 2**20
_DTYPE_BYTES: dict[GgufDtype, int] = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export that can begin: its checkpoint, base model and target, and the disk space that it takes."""

    uri: str
    checkpoint: Checkpoint
    base_model: str
    model_dir: Path
    target: Path
    format: Format
    dtype: GgufDtype | None
    needed_bytes: int


class Exported(msgspec.Struct, frozen=True):
    """What was written; of a merged model (GGUF, too) also how its logits compare with those of base plus adapter."""

    size_bytes: int
    difference: float | None = None
    tolerance: float | None = None
    effect: float | None = None
    dtype: str | None = None


class Exports:
    def __init__(self, db: Database, store: CheckpointStore, catalogue: Catalogue) -> None:
        self._db = db
        self._store = store
        self._catalogue = catalogue

    async def plan(
        self,
        uri: str,
        target: Path,
        format: Format,
        on_stage: Callable[[str], None] = lambda _stage: None,
        dtype: GgufDtype | None = None,
    ) -> ExportPlan:
        """Check everything that can be checked before any work; a base model that was never used is prepared.

        Args:
            uri: the checkpoint's ``bt://`` path, or its id.
            dtype: of a GGUF's matrices; the base's by default.

        Raises:
            BadRequest: a malformed URI, or a dtype for another format.
            NotFound: no such checkpoint, or its base model is not in the catalogue any more.
            Conflict: the target is there already.
            OperationFailed: the disk is too full, or the base model cannot be had.
        """
        if dtype is not None and format != "gguf":
            raise BadRequest("dtype", "a GGUF's; a merged model keeps the dtype of its base, an adapter float32")
        row = await self._row(uri)
        target = target.expanduser().absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise Conflict(f"{target} exists already and is not an empty folder")
        model = await self._catalogue.resolve(row.base_model)
        model_dir = await self._catalogue.prepare(model.name, on_stage)
        needed = _SPARE_BYTES + _needed(await self._store.folder(row.id), model_dir, format, dtype)
        free = shutil.disk_usage(_existing(target)).free
        if free < needed:
            raise OperationFailed(f"the export needs {needed:,} bytes; the disk of {target} has {free:,}")
        return ExportPlan(uri, row, model.name, model_dir, target, format, dtype, needed)

    async def _row(self, uri: str) -> Checkpoint:
        async with self._db.read() as session:
            if is_id(uri):
                row = await queries_checkpoints.get(session, uri)
            else:
                parsed = parse_checkpoint_uri(uri, "uri")
                row = await queries_checkpoints.named(session, parsed.run_id, parsed.target, parsed.name)
        if row is None:
            raise NotFound("checkpoint", uri)
        return row

    async def write(self, plan: ExportPlan, on_progress: Callable[[str, float], None]) -> Exported:
        """Write and check the folder; it appears whole or not at all.

        Raises:
            OperationFailed: with the cause; nothing is left behind.
        """
        aside = plan.target.with_name(f".{plan.target.name}.{new_id()}.partial")
        await self._store.check(plan.checkpoint.id)
        source = await self._store.folder(plan.checkpoint.id)
        try:
            await asyncio.to_thread(plan.target.parent.mkdir, parents=True, exist_ok=True)
            arguments = [plan.format, str(source), str(plan.model_dir), str(aside), "--base-model", plan.base_model]
            if plan.dtype is not None:
                arguments += ["--dtype", plan.dtype]
            facts = await run_subprocess(await launch_adapters(*arguments), on_progress)
            await asyncio.to_thread(_publish, aside, plan.target)
        except OSError as error:
            raise OperationFailed(f"{plan.target} cannot be written: {error}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        return msgspec.json.decode(facts, type=Exported)


class _AdapterConfig(msgspec.Struct):
    target_modules: list[str] = []


def _changes_head(checkpoint: Path) -> bool:
    """Whether the checkpoint's adapter changes the output layer."""
    try:
        raw = (checkpoint / "adapter_config.json").read_bytes()
        return "lm_head" in msgspec.json.decode(raw, type=_AdapterConfig).target_modules
    except (OSError, msgspec.MsgspecError):
        # A damaged checkpoint is refused by the export itself, with its cause.
        return False


def _publish(aside: Path, target: Path) -> None:
    # The checkpoint's own files are for their owner alone; these go by the umask, as the folder does.
    mode = aside.stat().st_mode & 0o666
    for path in aside.iterdir():
        path.chmod(mode)
    # Replaces an empty folder; one that was filled meanwhile is an error.
    os.rename(aside, target)
    sync_directory(target.parent)


def _needed(folder: Path, model_dir: Path, format: Format, dtype: GgufDtype | None) -> int:
    if format != "peft":
        others = sum((model_dir / name).stat().st_size for name in tokenizer_files(model_dir))
        facts = read_facts(model_dir)
        numbers = facts.num_parameters + (facts.num_tied if _changes_head(folder) else 0)
        stored_bytes = facts.size_bytes * numbers // facts.num_parameters
        return others + (stored_bytes if dtype is None else numbers * _DTYPE_BYTES[dtype])
    return sum(path.stat().st_size for path in folder.glob("adapter_*"))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
