"""A frozen weight that is kept in few bits and dequantised for each product, forward and backward, a part at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.torch.linear import FrozenLinear, Products, plain_in_float32, plain_input_grad
from selfloop.engine.models.quantized.codes import NF4_BLOCK, Codes, work_bytes

# Elements of a weight that are dequantised at once: on a CPU its cache should hold them, on a GPU a product should be
# large.
_CPU_ELEMENTS, _CUDA_ELEMENTS = 2**20, 2**25


class Parts(NamedTuple):
    """In what parts a weight is dequantised: so many rows for a product, so many columns for one of a backward."""

    rows: int
    columns: int
    num_bytes: int
    """The most that a part takes, with what it is made by."""

    @classmethod
    def of(cls, out_features: int, in_features: int, device: torch.device) -> "Parts":
        limit = _CUDA_ELEMENTS if device.type == "cuda" else _CPU_ELEMENTS
        padded = -(-in_features // NF4_BLOCK) * NF4_BLOCK
        rows = min(out_features, max(1, limit // padded))
        columns = min(padded, max(1, limit // out_features // NF4_BLOCK) * NF4_BLOCK)
        return cls(rows, columns, work_bytes(max(rows * padded, columns * out_features)))


class QuantizedLinear(FrozenLinear):
    """y = x W'^T + bias, W' being what ``codes`` stand for, rounded once to the type of x.

    No dense copy outlives a product: the backward's dy W' dequantises anew. Rows of W' are dealt to parts of the
    product, in the backward its columns are, so that nothing is summed over parts.
    """

    def __init__(self, codes: Codes, out_features: int, in_features: int, bias_O: Tensor | None, device: torch.device):
        self.out_features, self.in_features, self.bias_O = out_features, in_features, bias_O
        self.codes = codes
        self._parts = Parts.of(out_features, in_features, device)

    @property
    def products(self) -> Products:
        return "plain"

    @property
    def float32_copy_bytes(self) -> int:
        return 0

    @property
    def dequantized_bytes(self) -> int:
        return self._parts.num_bytes

    def lay_out(self, products: Products, *, shared: bool = False) -> None:
        """It is laid out already."""

    def plain(self) -> Tensor:
        """What it computes with in float32, dense."""
        return self.codes.dequantized(torch.float32)

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO = x_TI.new_empty(x_TI.shape[0], self.out_features)
        for rows in _slices(self.out_features, self._parts.rows):
            torch.mm(x_TI, self.codes.rows(rows).dequantized(x_TI.dtype).t(), out=y_TO[:, rows])
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        dx_TI = dy_TO.new_empty(dy_TO.shape[0], self.in_features)
        for columns in _slices(self.in_features, self._parts.columns):
            dx_TI[:, columns] = plain_input_grad(dy_TO, self.codes.columns(columns).dequantized(dy_TO.dtype))
        return dx_TI

    def in_float32(self, x_TI: Tensor) -> Tensor:
        slices = _slices(self.out_features, self._parts.rows)
        parts = (self.codes.rows(rows).dequantized(x_TI.dtype) for rows in slices)
        y_TO = torch.cat([plain_in_float32(x_TI, part_CI) for part_CI in parts], dim=1)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)

    def up_to_a_shift(self, x_TI: Tensor, references_T: Tensor) -> Tensor:
        return self.in_float32(x_TI)


def _slices(num: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]
