"""Training examples as they travel from the dialects to the engine: plain bytes, no torch, no numpy."""

from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from selfloop.types.images import Image
from selfloop.types.routes import Routes

DType = Literal["int64", "float32"]
_TYPECODE: dict[DType, str] = {"int64": "q", "float32": "f"}

IGNORED_TARGET = -100
"""A target with this id is masked: no loss, no gradient, its logprob is null."""


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """A dense row-major tensor. ``data`` is little-endian; ``shape`` counts elements."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: Sequence[int] | Sequence[float], dtype: DType, shape: Sequence[int] | None = None) -> "Tensor":
        """Pack ``values`` (already flat). Raises TypeError or OverflowError on a value the dtype cannot hold."""
        flat = array(_TYPECODE[dtype], values)
        return cls(dtype, tuple(shape) if shape is not None else (len(flat),), flat.tobytes())

    def values(self) -> "array[int] | array[float]":
        """The flat elements."""
        flat = array(_TYPECODE[self.dtype])
        flat.frombytes(self.data)
        return flat

    @property
    def num_elements(self) -> int:
        return len(self.data) // array(_TYPECODE[self.dtype]).itemsize


class Datum(msgspec.Struct, frozen=True):
    """One example: ``tokens`` (N,) int64 in, and per-token inputs of the loss.

    ``loss_inputs["target_tokens"]`` is (N,) int64, already shifted: position i holds the token that
    position i must predict, or ``IGNORED_TARGET``. Cross entropy also takes (N, K): K targets a position.
    ``routes`` are the experts that tokens are sent to, of a model that has some; None routes all of them anew.
    ``images`` are in the order of their placeholders, which are among the tokens.
    """

    tokens: Tensor
    loss_inputs: dict[str, Tensor]
    routes: Routes | None = None
    images: list[Image] = []
