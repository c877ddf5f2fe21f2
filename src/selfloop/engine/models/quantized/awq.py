"""AWQ (Lin et al., arXiv 2306.00978) as AutoAWQ packs it for its gemm kernels.

w[o, i] = s[g, o] * (q[i, o] - z[g, o]), g = i / group size. Words hold eight numbers along the output, in the order
0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfloop.engine.models.quantized.packing import group_of_each, unpacked
from selfloop.types.quantization import Quantization

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """``qweight`` (I, O / 8), ``qzeros`` (G, O / 8), ``scales`` (G, O) -> (O, I)."""
    q_IO, zeros_GO = (_in_order(unpacked(parts[role], of.bits, 1)) for role in ("qweight", "qzeros"))
    group_I = group_of_each(q_IO.shape[0], of.group_size)
    weight_IO = parts["scales"].float()[group_I] * (q_IO - zeros_GO[group_I]).float()
    return weight_IO.t().contiguous()


def _in_order(numbers_NO: Tensor) -> Tensor:
    place = torch.tensor([_ORDER.index(number) for number in range(len(_ORDER))])
    return numbers_NO.unflatten(1, (-1, len(_ORDER)))[:, :, place].flatten(1)
