"""bitsandbytes: int8 rows (Dettmers et al., arXiv 2208.07339), and four bits by a table (QLoRA, arXiv 2305.14314).

int8: w = q * s / 127, s the largest of a row. Four bits: w = table[q] * s, s the largest of a block of the flat weight;
a byte holds two numbers, the first in its upper half. Nested, s itself is nested_table[n] * t + offset.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from selfloop.engine.models.quantized.codes import INT8_MOST, NF4_BLOCK, NF4_TABLE, Codes, Int8Rows, Nf4Blocks
from selfloop.types.errors import model_invalid
from selfloop.types.quantization import Quantization
from selfloop.types.settings import KeptAs


class _State(msgspec.Struct):
    """What is written beside a weight of four bits."""

    shape: list[int]
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """int8 ``weight`` (O, I) and ``scale`` (O), or uint8 ``weight`` of two numbers each, as ``state`` says."""
    if "scale" in parts:
        return parts["weight"].float() * _row_scales(parts)[:, None]
    state = _state(parts["state"])
    bytes_N = parts["weight"].flatten()
    numbers = torch.stack((bytes_N >> 4, bytes_N & 0x0F), dim=-1).flatten()
    num = int(torch.Size(state.shape).numel())
    values = parts["quant_map"].float()[numbers[:num].int()]
    return _scaled(values, _absmax(parts, state), state.blocksize).view(state.shape)


def codes(parts: Mapping[str, Tensor], of: Quantization, kept_as: KeptAs) -> Codes | None:
    """The stored numbers as they are; None where they mean something else in that form."""
    if "scale" in parts:
        return Int8Rows(parts["weight"], _row_scales(parts)) if kept_as == "int8" else None
    state, table = _state(parts["state"]), parts["quant_map"].float()
    is_nf4 = torch.equal(table, torch.tensor(NF4_TABLE)) and state.blocksize == NF4_BLOCK
    if kept_as != "nf4" or not is_nf4 or len(state.shape) != 2 or state.shape[1] % NF4_BLOCK:
        return None
    out, inner = state.shape
    bytes_OBP = parts["weight"].view(out, inner // NF4_BLOCK, NF4_BLOCK // 2)
    return Nf4Blocks(bytes_OBP, _absmax(parts, state).view(bytes_OBP.shape[:2]), inner)


def _row_scales(parts: Mapping[str, Tensor]) -> Tensor:
    if "layout" in parts and int(parts["layout"].reshape(())) != 0:
        raise model_invalid("bitsandbytes int8 weights in a layout of one GPU's kernels are not supported")
    return parts["scale"].float() / INT8_MOST


def _absmax(parts: Mapping[str, Tensor], state: _State) -> Tensor:
    """float32 scale of each block."""
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax.float()
    nested = parts["nested_quant_map"].float()[absmax.int()]
    return _scaled(nested, parts["nested_absmax"].float(), state.nested_blocksize) + state.nested_offset


def _scaled(values_N: Tensor, scales: Tensor, size: int) -> Tensor:
    """Each block of ``size`` times its scale."""
    return values_N * scales.repeat_interleave(size)[: len(values_N)]


def _state(stored: Tensor) -> _State:
    data: Any = bytes(stored.tolist())
    return msgspec.json.decode(data, type=_State)
