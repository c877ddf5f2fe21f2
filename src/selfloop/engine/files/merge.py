"""A base model's weights with an adapter added to them: W + scaling * B A.

Written files are those of the base, header for header: same names, same shards, same dtypes. Only the bytes of the
projections that the adapter changes are others, so one tensor is in memory at a time. An output layer that the base
ties to its embedding becomes a tensor of its own when the adapter changes it, last in the embedding's file.
"""

import json
import shutil
import struct
from collections.abc import Callable
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from selfloop.engine.files.base_weights import INDEX_FILE, weight_files
from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.peft import LoadedAdapter
from selfloop.engine.lora.targets import HEAD
from selfloop.types.errors import OperationFailed

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CHUNK_BYTES = 16 * 2**20
MODEL_CONFIG_FILE = "config.json"
_HEAD, _EMBEDDING = f"{HEAD}.weight", "model.embed_tokens.weight"


class _Stored(msgspec.Struct):
    """Where a tensor lies in a safetensors file; offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    @property
    def size(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


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
    config: dict[str, Any] = json.loads((model_dir / MODEL_CONFIG_FILE).read_bytes())
    untie = bool(config.get("tie_word_embeddings")) and _HEAD in deltas
    added: tuple[str, int] | None = None
    for path in weight_files(model_dir):
        added_bytes = _write_file(path, writer.file(path.name), deltas, untie, on_bytes)
        if added_bytes > 0:
            added = path.name, added_bytes
    deltas.check_used(model_dir)
    if (model_dir / INDEX_FILE).is_file():
        _write_index(writer, model_dir, added)
    if untie:
        writer.json(MODEL_CONFIG_FILE, config | {"tie_word_embeddings": False})
    else:
        shutil.copyfile(model_dir / MODEL_CONFIG_FILE, writer.file(MODEL_CONFIG_FILE))


def _write_index(writer: DirectoryWriter, model_dir: Path, added: tuple[str, int] | None) -> None:
    """``added`` is the file that got an output layer, and its bytes."""
    if added is None:
        shutil.copyfile(model_dir / INDEX_FILE, writer.file(INDEX_FILE))
        return
    index: dict[str, Any] = json.loads((model_dir / INDEX_FILE).read_bytes())
    index["weight_map"][_HEAD] = added[0]
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += added[1]
    writer.json(INDEX_FILE, index)


def _write_file(path: Path, target_path: Path, deltas: Deltas, untie: bool, on_bytes: Callable[[int], None]) -> int:
    """One weight file, merged; gives the bytes of an output layer that was added to it."""
    with path.open("rb") as source, target_path.open("wb") as target:
        header = _read_header(path, source)
        tensors: dict[str, Any] = json.loads(header)
        metadata: Any = tensors.pop("__metadata__", None)
        stored = msgspec.convert(tensors, dict[str, _Stored])
        # What a tied model keeps under the head's name is never read.
        kept = {name: place for name, place in stored.items() if not (untie and name == _HEAD)}
        tied = kept.get(_EMBEDDING) if untie else None
        if tied is not None or len(kept) < len(stored):
            header = _header(kept if tied is None else {**kept, _HEAD: tied}, metadata)
        target.write(struct.pack("<Q", len(header)) + header)
        start = source.tell()
        for name, place in sorted(kept.items(), key=lambda item: item[1].data_offsets):
            source.seek(start + place.data_offsets[0])
            if name in deltas:
                target.write(_merged(name, _read(source, place.size), place, deltas))
            else:
                _copy(source, target, place.size)
            on_bytes(place.size)
        if tied is None:
            return 0
        source.seek(start + tied.data_offsets[0])
        target.write(_merged(_HEAD, _read(source, tied.size), tied, deltas))
        return tied.size


def _header(places: dict[str, _Stored], metadata: object) -> bytes:
    """The header of a file with these tensors one after another: in the order of their offsets, the head last."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[0] == _HEAD, item[1].data_offsets)):
        header[name] = _Stored(place.dtype, place.shape, (end, end + place.size))
        end += place.size
    data = msgspec.json.encode(header)
    return data + b" " * (-len(data) % 8)


def _pairs(adapter: LoadedAdapter) -> dict[str, _Delta]:
    """A and B of each projection by the name of its weight."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for parameter in adapter.shape.named(adapter.theta_P):
        module = parameter.name.removesuffix("." + parameter.kind)
        weight = f"{module if module == HEAD else 'model.' + module}.weight"
        pairs.setdefault(weight, {})[parameter.kind] = parameter.view
    return {name: _Delta(pair["lora_A"], pair["lora_B"]) for name, pair in pairs.items()}


def _read_header(path: Path, file: BufferedReader) -> bytearray:
    (length,) = struct.unpack("<Q", _read(file, 8))
    if length > path.stat().st_size - 8:
        raise OperationFailed(f"{path} cannot be read: it is cut short")
    return _read(file, length)


def _read(file: BufferedReader, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:
        raise OperationFailed(f"{file.name} cannot be read: it is cut short")
    return data


def _copy(source: BufferedReader, target: BufferedWriter, size: int) -> None:
    while size > 0:
        target.write(_read(source, min(size, _CHUNK_BYTES)))
        size -= _CHUNK_BYTES


def _merged(name: str, data: bytearray, place: _Stored, deltas: Deltas) -> memoryview:
    if place.dtype not in _DTYPES:
        raise OperationFailed(f"{name} is {place.dtype}; only {sorted(_DTYPES)} can be merged")
    dtype = _DTYPES[place.dtype]
    merged_OI = deltas.added(name, torch.frombuffer(data, dtype=dtype).view(place.shape), dtype)
    return merged_OI.view(torch.uint8).numpy().data
