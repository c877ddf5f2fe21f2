"""Microscaling float4: blocks of 32 numbers of e2m1 that share a power of two (OCP Microscaling Formats 1.0, 5.2).

w = v * 2^(s - 127), v one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. A byte holds two numbers, the first in its
lower half. The files have experts as (E, O, I / 32, 16); the model has them as (E, I, O).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfloop.types.quantization import Quantization

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """``blocks`` uint8 (E, O, G, 16) and ``scales`` uint8 (E, O, G) -> (E, I, O)."""
    blocks, exponents = parts["blocks"], parts["scales"].int() - _BIAS
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    pairs = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    weight = torch.ldexp(values[pairs.int()], exponents[..., None])
    return weight.flatten(-2).transpose(1, 2).contiguous()
