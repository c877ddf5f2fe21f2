"""Small unsigned integers in words of 32 bits."""

import torch
from torch import Tensor

_WORD_BITS = 32


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 numbers along ``dim``, which has them in words, the first in the lowest bits."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(shifts)
    numbers = (words.int().unsqueeze(dim + 1) >> shifts.view(shape)) & (2**bits - 1)
    return numbers.flatten(dim, dim + 1)


def group_of_each(num_rows: int, group_size: int | None) -> Tensor:
    """int64 number of each row's group."""
    return torch.arange(num_rows) // (group_size or num_rows)
