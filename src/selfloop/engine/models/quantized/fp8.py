"""Eight bits with scales: float8 e4m3 or int8, a scale for each matrix, row or block.

w = q * s. Blocks as in the DeepSeek-V3 technical report (section 3.3.2; arXiv 2412.19437), whose files name them
``weight_scale_inv``, though it multiplies; rows and matrices as compressed-tensors and FBGEMM write ``weight_scale``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from selfloop.engine.models.quantized.codes import Codes, Int8Rows
from selfloop.types.quantization import Quantization
from selfloop.types.settings import KeptAs


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


def codes(parts: Mapping[str, Tensor], of: Quantization, kept_as: KeptAs) -> Codes | None:
    """The stored int8 numbers as they are; None where they mean something else in that form."""
    weight, scale = parts["weight"], parts["scale"].float()
    if kept_as != "int8" or weight.dtype != torch.int8 or weight.dim() != 2 or of.block is not None:
        return None
    return Int8Rows(weight, scale.reshape(-1).expand(weight.shape[0]))
