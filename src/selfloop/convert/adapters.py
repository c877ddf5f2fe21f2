"""Takes adapters out of checkpoints and into them. Runs as a process of its own:

    python -m selfloop.convert.adapters peft CHECKPOINT MODEL TARGET --base-model NAME
    python -m selfloop.convert.adapters merged CHECKPOINT MODEL TARGET --base-model NAME
    python -m selfloop.convert.adapters gguf CHECKPOINT MODEL TARGET --base-model NAME [--dtype f32|f16|bf16]
    python -m selfloop.convert.adapters import ADAPTER MODEL TARGET

``MODEL`` is the base model's folder, ``TARGET`` a folder that does not exist yet. Stdout is JSON lines, as those of
:mod:`selfloop.convert.prepare`: progress, and last ``{"stage": "done", "fraction": 1.0, "facts": {...}}`` (exit 0) or
``{"error": "..."}`` (exit 1). At exit 0 ``TARGET`` is whole, checked and on disk; otherwise it is not there.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch

from selfloop.convert.gguf.read import GgufSource
from selfloop.convert.gguf.write import write_gguf
from selfloop.convert.model_card import adapter_card, gguf_card, merged_card
from selfloop.convert.opened import logits_by_transformers
from selfloop.engine.files.base_copies import BaseTensors
from selfloop.engine.files.checkpoint import STATE_FILE, RunState, write_sampler
from selfloop.engine.files.compare import Logits, ModelOnDisk, compare, logits_on_disk, model_in
from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.merge import MODEL_CONFIG_FILE, write_merged
from selfloop.engine.files.peft import LoadedAdapter, read_foreign_peft, read_peft, write_peft
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import DTYPES, stored_weights
from selfloop.engine.train.run import Run
from selfloop.types.digests import check_folder
from selfloop.types.errors import OperationFailed, SelfloopError
from selfloop.types.model_folder import tokenizer_files

Report = Callable[[str, float], None]
"""Called with a stage and the fraction of the whole that is done."""

Facts = dict[str, Any]

GGUF_FILE = "model.gguf"

_GGUF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

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
    spec = read_spec(model_dir)
    loaded = _read(checkpoint, spec)
    stored = _gguf_dtype(model_dir) if dtype is None else _GGUF_DTYPES[dtype]
    writer = DirectoryWriter(target)
    path = writer.file(GGUF_FILE)
    write_gguf(path, model_dir, loaded, base_model, stored, _progress(model_dir, report))
    writer.text("README.md", gguf_card(base_model, loaded.shape.rank, loaded.alpha, _step(checkpoint)))
    size_bytes = writer.close()
    report("check", _WRITTEN)
    source = GgufSource(path, spec)
    return {"size_bytes": size_bytes} | _checked(
        model_dir, loaded, partial(logits_on_disk, ModelOnDisk(source.spec, source)), stored
    )


def import_peft(adapter: Path, model_dir: Path, target: Path, report: Report) -> Facts:
    """An adapter of the PEFT library as a checkpoint of ours, at step 0 and without optimizer state."""
    report("read", 0.0)
    if not any(adapter.glob("*.safetensors")) and any(adapter.glob("*.bin")):
        raise OperationFailed(f"{adapter} has only pickled weights, which are never loaded; save safetensors")
    spec = read_spec(model_dir)
    check_folder(adapter)
    loaded = read_foreign_peft(adapter, spec, BaseTensors(model_dir, spec))
    report("write", _WRITTEN)
    size_bytes = write_sampler(target, Run(loaded.shape, loaded.alpha, loaded.theta_P))
    return {
        "size_bytes": size_bytes,
        "lora_rank": loaded.shape.rank,
        "lora_alpha": loaded.alpha,
        "changes_nothing": loaded.shape.changes_nothing(loaded.theta_P),
    }


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
    weights = stored_weights(model_dir, read_spec(model_dir))
    return {DTYPES[stored.dtype] for stored in weights.tensors.values()}


def _stored_dtype(model_dir: Path) -> torch.dtype:
    """The coarsest dtype among the weights."""
    found = _stored_dtypes(model_dir)
    return next(dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64) if dtype in found)


def _step(checkpoint: Path) -> int:
    return msgspec.json.decode((checkpoint / STATE_FILE).read_bytes(), type=RunState).step


def _print_progress(stage: str, fraction: float) -> None:
    print(json.dumps({"stage": stage, "fraction": round(fraction, 4)}), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfloop.convert.adapters", description="Adapters out of and into files.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("peft", "merged", "gguf", "import"):
        arguments = kinds.add_parser(kind)
        arguments.add_argument("source", type=Path)
        arguments.add_argument("model", type=Path)
        arguments.add_argument("target", type=Path)
        if kind != "import":
            arguments.add_argument("--base-model", required=True)
        if kind == "gguf":
            arguments.add_argument("--dtype", choices=list(_GGUF_DTYPES))
    return parser


def _work(args: argparse.Namespace) -> Facts:
    if args.kind == "import":
        return import_peft(args.source, args.model, args.target, _print_progress)
    if args.kind == "gguf":
        return export_gguf(args.source, args.model, args.target, args.base_model, _print_progress, args.dtype)
    export = export_peft if args.kind == "peft" else export_merged
    return export(args.source, args.model, args.target, args.base_model, _print_progress)


def main(argv: list[str] | None = None) -> NoReturn:
    args = _parser().parse_args(argv)
    if args.target.exists():
        print(json.dumps({"error": f"{args.target} exists already"}), flush=True)
        sys.exit(1)
    try:
        facts = _work(args)
        # Whoever does not hear of it (it was killed) would not know to take or to remove the folder.
        print(json.dumps({"stage": "done", "fraction": 1.0, "facts": facts}), flush=True)
    except BaseException as error:
        shutil.rmtree(args.target, ignore_errors=True)
        if isinstance(error, SelfloopError | OSError):
            print(json.dumps({"error": str(error)}), flush=True)
            sys.exit(1)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
