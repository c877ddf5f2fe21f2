"""Eight bits with scales: float8 e4m3 or int8, a scale for each matrix, row or block.

w = q * s. Blocks as in the DeepSeek-V3 technical report (section 3.3.2; arXiv 2412.19437), whose files name them
``weight_scale_inv``, though it multiplies; rows and matrices as compressed-tensors and FBGEMM write ``weight_scale``.
"""

from collections.abc import Mapping

from torch import Tensor

from selfloop.types.quantization import Quantization


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """``weight`` (..., O, I); ``scale`` one number, (..., O), (..., O, 1), or a number for each block."""
    weight_OI, scale = parts["weight"].float(), parts["scale"].float()
    if scale.numel() == 1:
        return weight_OI.mul_(scale.reshape(()))
    if of.block is None:
        return weight_OI.mul_(scale.reshape(*weight_OI.shape[:-1], 1))
    rows, columns = of.block
    num_rows, num_columns = weight_OI.shape[-2:]
    spread = scale.repeat_interleave(rows, -2)[..., :num_rows, :].repeat_interleave(columns, -1)[..., :num_columns]
    return weight_OI.mul_(spread)
