"""Adapters out of checkpoints: alone as PEFT reads them, or merged into their base, as transformers or llama.cpp do."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch

from selfloop.convert.gguf.read import GgufSource
from selfloop.convert.gguf.write import write_gguf
from selfloop.convert.model_card import adapter_card, gguf_card, merged_card
from selfloop.convert.opened import logits_by_transformers
from selfloop.convert.reports import Facts, Report
from selfloop.engine.files.checkpoint import STATE_FILE, RunState, computed_in
from selfloop.engine.files.compare import Logits, ModelOnDisk, compare, logits_on_disk, model_in
from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.merge import MODEL_CONFIG_FILE, write_merged
from selfloop.engine.files.peft import LoadedAdapter, read_peft, write_peft
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import DTYPES, plain_weights, stored_weights
from selfloop.types.digests import check_folder
from selfloop.types.errors import OperationFailed
from selfloop.types.model_folder import tokenizer_files

GGUF_FILE = "model.gguf"
GGUF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# How the work is divided: reading, writing, checking.
_READ, _WRITTEN = 0.05, 0.75


def export_peft(checkpoint: Path, model_dir: Path, target: Path, base_model: str, report: Report) -> Facts:
    """The adapter alone, as ``PeftModel.from_pretrained`` reads it."""
    report("read", 0.0)
    spec = read_spec(model_dir)
    loaded = _read(checkpoint, spec)
    report("write", _READ)
    writer = DirectoryWriter(target)
    write_peft(writer, loaded.shape, loaded.theta_P, loaded.alpha, base_model)
    writer.text("README.md", adapter_card(base_model, loaded.shape.rank, loaded.alpha, _step(checkpoint)))
    size_bytes = writer.close()
    report("check", _WRITTEN)
    written = read_peft(target, spec)
    if written.alpha != loaded.alpha or not torch.equal(written.theta_P, loaded.theta_P):
        raise OperationFailed("the adapter that was written is not the checkpoint's; is the disk sound?")
    return {"size_bytes": size_bytes}


def export_merged(checkpoint: Path, model_dir: Path, target: Path, base_model: str, report: Report) -> Facts:
    """The base model with the adapter in its weights, as ``AutoModelForCausalLM.from_pretrained`` reads it."""
    report("read", 0.0)
    _check_can_merge(checkpoint)
    loaded = _read(checkpoint, read_spec(model_dir))
    writer = DirectoryWriter(target)
    for name in tokenizer_files(model_dir):
        if name != MODEL_CONFIG_FILE:
            shutil.copyfile(model_dir / name, writer.file(name))
    write_merged(writer, model_dir, loaded, _progress(model_dir, report))
    writer.text("README.md", merged_card(base_model, loaded.shape.rank, loaded.alpha, _step(checkpoint)))
    size_bytes = writer.close()
    report("check", _WRITTEN)
    opened = partial(logits_by_transformers, target, _stored_dtypes(model_dir))
    return {"size_bytes": size_bytes} | _checked(model_dir, loaded, opened, _stored_dtype(model_dir))


def export_gguf(
    checkpoint: Path, model_dir: Path, target: Path, base_model: str, report: Report, dtype: str | None = None
) -> Facts:
    """The merged model as one file, as llama.cpp reads it; matrices in ``dtype``, by default that of the base."""
    report("read", 0.0)
    _check_can_merge(checkpoint)
    spec = read_spec(model_dir)
    loaded = _read(checkpoint, spec)
    stored = _gguf_dtype(model_dir) if dtype is None else GGUF_DTYPES[dtype]
    writer = DirectoryWriter(target)
    path = writer.file(GGUF_FILE)
    write_gguf(path, model_dir, loaded, base_model, stored, _progress(model_dir, report))
    writer.text("README.md", gguf_card(base_model, loaded.shape.rank, loaded.alpha, _step(checkpoint)))
    size_bytes = writer.close()
    report("check", _WRITTEN)
    source = GgufSource(path)
    return {"size_bytes": size_bytes} | _checked(
        model_dir, loaded, partial(logits_on_disk, ModelOnDisk(source.spec, source)), stored
    )


def _check_can_merge(checkpoint: Path) -> None:
    """Refuse what is not a change of the stored weights, but of others that were made of them."""
    trained_in = computed_in(checkpoint)
    if trained_in is not None and trained_in.base_dtype is not None:
        raise OperationFailed(
            f"the adapter was trained on base weights in {trained_in.base_dtype}, and a merged model is not written of "
            "such; export the adapter alone (peft)"
        )


def _read(folder: Path, spec: ModelSpec) -> LoadedAdapter:
    """An adapter whose bytes are those that were written, where that can be told."""
    check_folder(folder)
    return read_peft(folder, spec)


def _progress(model_dir: Path, report: Report) -> Callable[[int], None]:
    """Reports how much of the base's weights is merged; called with the size of each tensor."""
    total = stored_weights(model_dir, read_spec(model_dir)).size_bytes
    written = 0

    def on_bytes(size: int) -> None:
        nonlocal written
        written += size
        report("merge", _READ + (_WRITTEN - _READ) * written / total)

    return on_bytes


def _checked(model_dir: Path, loaded: LoadedAdapter, merged: Logits, stored: torch.dtype) -> Facts:
    """What the comparison gave. Raises :class:`OperationFailed` when the merged model is another."""
    found = compare(model_in(model_dir), loaded, merged, stored)
    dtype = str(stored).removeprefix("torch.")
    if found.difference > found.tolerance:
        raise OperationFailed(
            f"the merged model is not base plus adapter: logits differ by up to {found.difference:.3g}, "
            f"{found.tolerance:.3g} is allowed for {dtype}"
        )
    return {**found._asdict(), "dtype": dtype}


def _gguf_dtype(model_dir: Path) -> torch.dtype:
    stored = _stored_dtype(model_dir)
    return torch.float32 if stored == torch.float64 else stored


def _stored_dtypes(model_dir: Path) -> set[torch.dtype]:
    weights = plain_weights(model_dir, read_spec(model_dir))
    return {DTYPES[stored.dtype] for stored in weights.tensors.values() if stored.dtype in DTYPES}


def _stored_dtype(model_dir: Path) -> torch.dtype:
    """The coarsest dtype among the weights."""
    found = _stored_dtypes(model_dir)
    return next(dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64) if dtype in found)


def _step(checkpoint: Path) -> int:
    return msgspec.json.decode((checkpoint / STATE_FILE).read_bytes(), type=RunState).step
