"""A base model's weights with an adapter added to them: W + scaling * B A.

Written files are those of the base: same shards, same dtypes, same order. Only the bytes of the projections that the
adapter changes are others, so one tensor is in memory at a time. An output layer that the base ties to its embedding
becomes a tensor of its own when the adapter changes it, last in the embedding's file. Names are the model's own, and
the configuration that is written says whether the two are tied, also where that of the base does not.
"""

import json
import struct
from collections.abc import Callable, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.peft import LoadedAdapter
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import HEAD_MODULE
from selfloop.engine.models.weights import DTYPES, plain_weights
from selfloop.types.errors import OperationFailed
from selfloop.types.model_weights import EMBEDDING, HEAD
from selfloop.types.safetensors_header import StoredTensor, read_metadata
from selfloop.types.text_half import text_half
from selfloop.types.transformers_models import loaded_as

_CHUNK_BYTES = 16 * 2**20
MODEL_CONFIG_FILE = "config.json"


class _Delta(NamedTuple):
    a_RI: Tensor
    b_OR: Tensor


class Deltas:
    """What an adapter adds to the weights of its base model."""

    def __init__(self, adapter: LoadedAdapter) -> None:
        self._scaling = adapter.alpha / adapter.shape.rank
        self._left = _pairs(adapter)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def added(self, name: str, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """``weight_OI`` with its delta, if it has one.

        The sum is taken in float32 (float64 for float64 weights) and rounded once, to ``dtype``.

        Raises:
            OperationFailed: a value does not fit ``dtype``.
        """
        delta = self._left.pop(name, None)
        sum_OI = weight_OI
        if delta is not None:
            sum_dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
            b_OR, a_RI = delta.b_OR.to(sum_dtype), delta.a_RI.to(sum_dtype)
            sum_OI = torch.addmm(weight_OI.to(sum_dtype), b_OR, a_RI, alpha=self._scaling)
        merged_OI = sum_OI.to(dtype)
        if not bool(merged_OI.isfinite().all()):
            raise OperationFailed(f"{name}: merged values do not fit {dtype}".replace("torch.", ""))
        return merged_OI

    def check_used(self, model_dir: Path) -> None:
        """Raises OperationFailed when a weight that the adapter changes was never asked for."""
        if self._left:
            raise OperationFailed(f"{model_dir} lacks {len(self._left)} tensors, e.g. {sorted(self._left)[:3]}")


class _Written(NamedTuple):
    """A tensor of the merged model by its name and that in the files, and the one of the base that it is made of."""

    name: str
    stored_as: str
    base: StoredTensor


def write_merged(
    writer: DirectoryWriter, model_dir: Path, adapter: LoadedAdapter, on_bytes: Callable[[int], None]
) -> None:
    """Write every weight file of ``model_dir``, merged, its index and its configuration.

    The sum is taken in float32 (float64 for float64 weights) and rounded once, to the dtype of the base.
    ``on_bytes`` hears of each tensor's size.

    Raises:
        OperationFailed: a file cannot be read, or a merged value does not fit the dtype.
    """
    deltas = Deltas(adapter)
    spec = read_spec(model_dir)
    weights = plain_weights(model_dir, spec)
    written = [
        _Written(name, stored.name if weights.renamed else name, stored) for name, stored in weights.tensors.items()
    ]
    untie = spec.tied and HEAD in deltas
    if untie:
        written.append(_Written(HEAD, HEAD, weights.tensors[EMBEDDING]))
    for path in weights.files:
        own = [tensor for tensor in written if tensor.base.file == path]
        # A header says offsets in the order of its tensors; the head, which may share the embedding's bytes, is last.
        own.sort(key=lambda tensor: (untie and tensor.name == HEAD, tensor.base.start))
        _write_file(path, writer.file(path.name), own, deltas, on_bytes)
    deltas.check_used(model_dir)
    if weights.index is not None:
        _write_index(writer, weights.index, written)
    whole: dict[str, Any] = json.loads((model_dir / MODEL_CONFIG_FILE).read_bytes())
    raw, tied = _as_loaded(text_half(whole)), spec.tied and not untie
    if raw is whole and bool(raw.get("tie_word_embeddings", False)) == tied:
        writer.file(MODEL_CONFIG_FILE).write_bytes((model_dir / MODEL_CONFIG_FILE).read_bytes())
    else:
        writer.json(MODEL_CONFIG_FILE, {**raw, "tie_word_embeddings": tied})


def _as_loaded(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """By the type that transformers loads it by, without code of its own where that is another."""
    kind = loaded_as(config)
    if kind == config.get("model_type"):
        return config
    return {name: of for name, of in config.items() if name != "auto_map"} | {"model_type": kind}


def _write_index(writer: DirectoryWriter, base_index: Path, written: list[_Written]) -> None:
    raw: dict[str, Any] = json.loads(base_index.read_bytes())
    metadata = raw.get("metadata")
    sizes = {"total_size": sum(tensor.base.size for tensor in written)}
    weight_map = {tensor.stored_as: tensor.base.file.name for tensor in sorted(written)}
    kept: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
    writer.json(base_index.name, {"metadata": kept | sizes, "weight_map": weight_map})


def _write_file(
    path: Path, target_path: Path, tensors: list[_Written], deltas: Deltas, on_bytes: Callable[[int], None]
) -> None:
    with path.open("rb") as source, target_path.open("wb") as target:
        header = _header(tensors, read_metadata(path))
        target.write(struct.pack("<Q", len(header)) + header)
        for name, _, base in tensors:
            source.seek(base.start)
            if name in deltas:
                target.write(_merged(name, _read(source, base.size), base, deltas))
            else:
                _copy(source, target, base.size)
            on_bytes(base.size)


def _header(tensors: list[_Written], metadata: dict[str, str]) -> bytes:
    """The header of a file with these tensors one after another."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | metadata}
    end = 0
    for _, stored_as, base in tensors:
        offsets = (end, end + base.size)
        header[stored_as] = {"dtype": base.dtype, "shape": base.shape, "data_offsets": offsets}
        end += base.size
    data = msgspec.json.encode(header)
    return data + b" " * (-len(data) % 8)


def _pairs(adapter: LoadedAdapter) -> dict[str, _Delta]:
    """A and B of each projection by the name of its weight."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for parameter in adapter.shape.named(adapter.theta_P):
        module = parameter.name.removesuffix("." + parameter.kind)
        weight = f"{module if module == HEAD_MODULE else 'model.' + module}.weight"
        pairs.setdefault(weight, {})[parameter.kind] = parameter.view
    return {name: _Delta(pair["lora_A"], pair["lora_B"]) for name, pair in pairs.items()}


def _read(file: BufferedReader, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:
        raise OperationFailed(f"{file.name} cannot be read: it is cut short")
    return data


def _copy(source: BufferedReader, target: BufferedWriter, size: int) -> None:
    while size > 0:
        target.write(_read(source, min(size, _CHUNK_BYTES)))
        size -= _CHUNK_BYTES


def _merged(name: str, data: bytearray, base: StoredTensor, deltas: Deltas) -> memoryview:
    dtype = DTYPES[base.dtype]
    merged_OI = deltas.added(name, torch.frombuffer(data, dtype=dtype).view(base.shape), dtype)
    return merged_OI.view(torch.uint8).numpy().data
