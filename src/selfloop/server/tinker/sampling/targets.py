"""``target_prompt_logprobs``: token ids at prompt positions, dense or CSR, and their logprobs in the same layout."""

from array import array
from itertools import pairwise
from typing import Any, NamedTuple

from selfloop.server.tinker import schema, wire
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import PromptTargets

_FIELD = "target_prompt_logprobs"
_NO_TOKEN = -1


class Targets(NamedTuple):
    """The cells (N - 1, K) that were asked for; ``columns`` are those of CSR cells, None for a dense tensor."""

    cells: PromptTargets
    shape: tuple[int, int]
    columns: "array[int] | None"

    def fill(self, message: Any, logprobs: bytes) -> None:
        """Write the logprobs, float32 in the order of the cells, into a ``Tensor``."""
        message.dtype = schema.FLOAT32
        message.shape.extend(self.shape)
        if self.columns is None:
            message.dense = logprobs
            return
        message.sparse_csr.values = logprobs
        message.sparse_csr.crow_indices = self.cells.rows
        message.sparse_csr.col_indices = self.columns.tobytes()


def read_targets(tensor: wire.TargetTokens, num_prompt: int, vocab_size: int) -> Targets:
    """Row i asks about prompt position i + 1. Raises :class:`BadRequest`."""
    if tensor.dtype != "int64":
        raise _wrong("dtype", f"int64, got {tensor.dtype[:100]!r}")
    shape = tensor.shape
    if shape is None or len(shape) != 2 or shape[0] != num_prompt - 1 or shape[1] < 1:
        raise _wrong("shape", f"[{num_prompt - 1}, K]: a row for each prompt token but the first; got {shape}")
    if not all(_NO_TOKEN <= token < vocab_size for token in tensor.data):
        raise _wrong("data", f"token ids from 0 to {vocab_size - 1}, or {_NO_TOKEN} for none")
    if all(token == _NO_TOKEN for token in tensor.data):
        raise _wrong("data", "at least one token id")
    columns = None if tensor.sparse_col_indices is None else _columns(tensor.sparse_col_indices, shape[1], tensor)
    rows = _dense_rows(tensor, shape) if columns is None else _sparse_rows(tensor, shape[0])
    cells = PromptTargets(rows.tobytes(), array("i", tensor.data).tobytes())
    return Targets(cells, (shape[0], shape[1]), columns)


def _dense_rows(tensor: wire.TargetTokens, shape: list[int]) -> "array[int]":
    if tensor.sparse_crow_indices is not None:
        raise _wrong("sparse_col_indices", "both sparse_crow_indices and sparse_col_indices, or neither")
    if len(tensor.data) != shape[0] * shape[1]:
        raise _wrong("data", f"{shape[0] * shape[1]} values for shape {shape}, got {len(tensor.data)}")
    return array("q", range(0, len(tensor.data) + 1, shape[1]))


def _sparse_rows(tensor: wire.TargetTokens, num_rows: int) -> "array[int]":
    crow = tensor.sparse_crow_indices
    expected = f"{num_rows + 1} offsets that rise from 0 to {len(tensor.data)}"
    if crow is None or len(crow) != num_rows + 1 or crow[0] != 0 or crow[-1] != len(tensor.data):
        raise _wrong("sparse_crow_indices", expected)
    if any(later < earlier for earlier, later in pairwise(crow)):
        raise _wrong("sparse_crow_indices", expected)
    return array("q", crow)


def _columns(given: list[int], width: int, tensor: wire.TargetTokens) -> "array[int]":
    if len(given) != len(tensor.data) or not all(0 <= column < width for column in given):
        raise _wrong("sparse_col_indices", f"{len(tensor.data)} columns from 0 to {width - 1}")
    return array("q", given)


def _wrong(part: str, expected: str) -> BadRequest:
    return BadRequest(f"{_FIELD}.{part}", expected)
