"""A frozen matrix as the kernels read it."""

import torch
from torch import Tensor

from selfloop.engine.backends.cpu_native.library import LANES, Kernels, RowLogprobs


class Panels:
    """W (N, K) in panels of 16 rows, from a matrix of any strides, which is not kept."""

    def __init__(self, kernels: Kernels, weight_NK: Tensor) -> None:
        self._kernels = kernels
        self.num_rows, self.num_columns = weight_NK.shape
        self.data = torch.empty(_up(self.num_rows, LANES) * _up(self.num_columns, 2), dtype=kernels.weights)
        kernels.pack(weight_NK, self.data)

    def multiply(self, x_MK: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T as float32 (M, N), of rows x (M, K); in ``out`` where that is given, see :meth:`room`."""
        assert x_MK.dtype == self._kernels.rows
        assert x_MK.shape[1] == self.num_columns
        x_MK = x_MK.contiguous()
        if self.num_columns % 2:
            x_MK = torch.nn.functional.pad(x_MK, (0, 1))
        out = self.room(x_MK.shape[0]) if out is None else out[: x_MK.shape[0]]
        self._kernels.multiply(x_MK, self.data, self.num_rows, out)
        return out[:, : self.num_rows]

    def room(self, num: int) -> Tensor:
        """For a product with that many rows, the kernels' padding included."""
        return torch.empty(num, _up(self.num_rows, LANES))

    def target_logprobs(self, logits_MN: Tensor, targets_M: Tensor, weights_MN: Tensor | None) -> RowLogprobs:
        """See :meth:`Kernels.target_logprobs`."""
        return self._kernels.target_logprobs(logits_MN, targets_M.contiguous(), weights_MN)

    def dense(self) -> Tensor:
        """A plain copy (N, K)."""
        out_NK = torch.empty(self.num_rows, self.num_columns, dtype=self.data.dtype)
        self._kernels.unpack(self.data, out_NK)
        return out_NK


def _up(n: int, to: int) -> int:
    return -(-n // to) * to
