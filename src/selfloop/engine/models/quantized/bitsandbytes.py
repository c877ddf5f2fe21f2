"""bitsandbytes: int8 rows (Dettmers et al., arXiv 2208.07339), and four bits by a table (QLoRA, arXiv 2305.14314).

int8: w = q * s / 127, s the largest of a row. Four bits: w = table[q] * s, s the largest of a block of the flat weight;
a byte holds two numbers, the first in its upper half. Nested, s itself is nested_table[n] * t + offset.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from selfloop.types.errors import model_invalid
from selfloop.types.quantization import Quantization

_INT8_MOST = 127


class _State(msgspec.Struct):
    """What is written beside a weight of four bits."""

    shape: list[int]
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """int8 ``weight`` (O, I) and ``scale`` (O), or uint8 ``weight`` of two numbers each, as ``state`` says."""
    if "scale" in parts:
        if "layout" in parts and int(parts["layout"].reshape(())) != 0:
            raise model_invalid("bitsandbytes int8 weights in a layout of one GPU's kernels are not supported")
        return parts["weight"].float() * (parts["scale"].float() / _INT8_MOST)[:, None]
    state = _state(parts["state"])
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        nested = parts["nested_quant_map"].float()[absmax.int()]
        absmax = _scaled(nested, parts["nested_absmax"].float(), state.nested_blocksize) + state.nested_offset
    bytes_N = parts["weight"].flatten()
    numbers = torch.stack((bytes_N >> 4, bytes_N & 0x0F), dim=-1).flatten()
    num = int(torch.Size(state.shape).numel())
    values = parts["quant_map"].float()[numbers[:num].int()]
    return _scaled(values, absmax.float(), state.blocksize).view(state.shape)


def _scaled(values_N: Tensor, scales: Tensor, size: int) -> Tensor:
    """Each block of ``size`` times its scale."""
    return values_N * scales.repeat_interleave(size)[: len(values_N)]


def _state(stored: Tensor) -> _State:
    data: Any = bytes(stored.tolist())
    return msgspec.json.decode(data, type=_State)
