"""Facts of a flat gradient, in few passes over it."""

import math

import torch
from torch import Tensor

_ROW = 4096


def all_finite(values: Tensor) -> bool:
    """A NaN or an infinity makes any sum one; a sum that merely overflows is looked into."""
    return math.isfinite(float(values.sum())) or math.isfinite(float(torch.linalg.vector_norm(values, ord=math.inf)))


def global_norm(values_P: Tensor) -> float:
    """Euclidean norm of finite float32 values: of rows in float32, over the rows in float64."""
    whole = values_P.shape[0] // _ROW * _ROW
    rows = torch.linalg.vector_norm(values_P[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(values_P[whole:])
    norm = float(torch.linalg.vector_norm(torch.cat((rows, rest[None])), dtype=torch.float64))
    if math.isfinite(norm):
        return norm
    # The squares overflowed in float32.
    return float(torch.linalg.vector_norm(values_P, dtype=torch.float64))
