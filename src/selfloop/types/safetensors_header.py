"""What a safetensors file says it holds, checked against its size before anybody takes memory for it."""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec

MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""

_METADATA = "__metadata__"
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class BadSafetensors(ValueError):
    """A file that is no whole safetensors file; the text says what is wrong."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is.

    Args:
        start: its first byte, counted from the beginning of the file.
        size: in bytes.
        rows: where it is a part of a stack of matrices: of which, from which row, up to which.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    rows: tuple[int, int, int] | None = None

    @property
    def count(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of ``file`` in the order of their bytes.

    Raises:
        BadSafetensors: the header is wrong, the file is cut short, or tensors overlap.
        OSError: the file cannot be read.
    """
    header, size = _read(file)
    start = 8 + len(header)
    raw = _decode(file, header)
    raw.pop(_METADATA, None)
    tensors = [_checked(file, name, _entry(file, name, entry), start) for name, entry in raw.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    _check_places(file, tensors, start, size)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What its writer noted in it; raises as :func:`read_header` does."""
    raw = _decode(file, _read(file)[0]).get(_METADATA)
    try:
        return {} if raw is None else msgspec.json.decode(raw, type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise BadSafetensors(f"{file} has broken metadata: {error}") from error


def _read(file: Path) -> tuple[bytes, int]:
    """The header as it is written, and the size of the file."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length_bytes = stream.read(8)
        if len(length_bytes) != 8:
            raise BadSafetensors(f"{file} cannot be read: it is not a safetensors file")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BadSafetensors(f"{file} cannot be read: it is not a safetensors file, or it is cut short")
        return stream.read(length), size


def _decode(file: Path, header: bytes) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadSafetensors(f"{file} has a broken header: {error}") from error


def _entry(file: Path, name: str, raw: msgspec.Raw) -> _Entry:
    try:
        return msgspec.json.decode(raw, type=_Entry)
    except msgspec.MsgspecError as error:
        raise BadSafetensors(f"{file} has a broken header: {name}: {error}") from error


def _checked(file: Path, name: str, entry: _Entry, data_start: int) -> StoredTensor:
    start, end = entry.data_offsets
    if entry.dtype not in _ITEM_BITS:
        raise BadSafetensors(f"{file}: {name} has the unknown dtype {entry.dtype!r}")
    if any(not 0 <= size < 2**63 for size in entry.shape):
        raise BadSafetensors(f"{file}: {name} has the shape {entry.shape}")
    num_bits = prod(entry.shape) * _ITEM_BITS[entry.dtype]
    if not 0 <= start <= end or num_bits != 8 * (end - start):
        said = f"{entry.dtype} {entry.shape} in the bytes {start} to {end}"
        raise BadSafetensors(f"{file}: {name} is said to be {said}, which does not fit")
    return StoredTensor(file, name, entry.dtype, tuple(entry.shape), data_start + start, end - start)


def _check_places(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Every byte after the header belongs to one tensor."""
    at = start
    for tensor in tensors:
        if tensor.start != at:
            kind = "overlaps another tensor" if tensor.start < at else "comes after bytes that belong to no tensor"
            raise BadSafetensors(f"{file}: {tensor.name} {kind}")
        at += tensor.size
    if at > size:
        raise BadSafetensors(f"{file} is cut short: its header declares {at} bytes, it has {size}")
    if at < size:
        raise BadSafetensors(f"{file} has {size - at} bytes that belong to no tensor")
