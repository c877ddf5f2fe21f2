"""GPTQ (Frantar et al., arXiv 2210.17323) as AutoGPTQ and GPTQModel pack it.

w[o, i] = s[g, o] * (q[i, o] - z[g, o]), g the group of input i: ``g_idx`` where inputs were taken in another order.
Words hold numbers along the input in ``qweight``, along the output in ``qzeros``; the first version of the format
stores z - 1, modulo the numbers there are.
"""

from collections.abc import Mapping

from torch import Tensor

from selfloop.engine.models.quantized.packing import group_of_each, unpacked
from selfloop.types.quantization import Quantization


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """``qweight`` (I / pack, O), ``qzeros`` (G, O / pack), ``scales`` (G, O), ``g_idx`` (I) -> (O, I)."""
    q_IO = unpacked(parts["qweight"], of.bits, 0)
    zeros_GO = (unpacked(parts["qzeros"], of.bits, 1) + of.zero_offset) & (2**of.bits - 1)
    order = parts.get("g_idx")
    group_I = group_of_each(q_IO.shape[0], of.group_size) if order is None else order.long()
    weight_IO = parts["scales"].float()[group_I] * (q_IO - zeros_GO[group_I]).float()
    return weight_IO.t().contiguous()
