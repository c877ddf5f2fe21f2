"""A second copy of the frozen weights for products of a few rows on a CPU, where reading weights is what takes time.

FBGEMM, which PyTorch brings on x86, reads weights in float16 and computes in float32, at about twice the speed that
oneDNN reads bfloat16 at with one row. A bfloat16 number within float16's range is the same number in float16, and
the sum is never rounded to 16 bits; below 2^-14 a weight is rounded to a multiple of 2^-24.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfloop.engine.models.linear import FrozenLinear

MAX_ROWS = 4
"""From more rows on oneDNN is faster. (On the output layer it never is below 32, as it computes that one twice.)"""
MAX_HEAD_ROWS = 32

_MAX_FLOAT16 = 65504.0
# The operator itself: what wraps it in Python costs as much as a small product.
_product = torch.ops.quantized.linear_dynamic_fp16._op


class FewRowsLinear:
    """y = x W^T + bias, float32 in and out. Use :func:`few_rows`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        bias = None if bias_O is None else bias_O.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.float(), bias)

    def __call__(self, x_TI: Tensor) -> Tensor:
        return _product(x_TI, self._packed)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the copy is possible and of use: bfloat16 on a CPU for which PyTorch brings FBGEMM."""
    return device.type == "cpu" and dtype == torch.bfloat16 and "fbgemm" in torch.backends.quantized.supported_engines


def few_rows(linears: Sequence[FrozenLinear]) -> list[FewRowsLinear] | None:
    """The copies; None where a weight is beyond float16's range."""
    packed: list[FewRowsLinear] = []
    for linear in linears:
        weight_OI = linear.plain()
        if not weight_OI.abs().max() <= _MAX_FLOAT16:
            return None
        packed.append(FewRowsLinear(weight_OI, linear.bias_O))
    return packed
