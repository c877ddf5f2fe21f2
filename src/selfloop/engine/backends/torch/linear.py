"""A frozen weight, laid out once for the fastest product of its device; training and sampling multiply by nothing else.

On a CPU with bfloat16 instructions oneDNN reads weights in blocks: laid out once, a product of few rows takes about
half the time of one that reorders the weight at every call, and a row's numbers do not depend on how many others there
are. The layout is a rule rather than a measurement: a worker that starts anew must not come to another choice.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Products = Literal["plain", "blocked"]
"""By PyTorch's operators on plain matrices, or by oneDNN on its own layout."""

_mkldnn = torch.ops.mkldnn
# What is summed in float32 in one go. In a sum over a vocabulary small terms would vanish beside what is there already.
MAX_SUMMANDS = 8192
# Float32 copies of a weight that is only at hand in another type.
_MAX_COPY_ELEMENTS = 4 * 2**20


def best_products(device: torch.device, dtype: torch.dtype) -> Products:
    """Blocks for bfloat16 on a CPU that computes in it; elsewhere the plain product is as fast."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not _mkldnn._is_mkldnn_bf16_supported():
        return "plain"
    return "blocked"


class FrozenLinear:
    """y = x W^T + bias with W (out, in), which is given plain; see :meth:`lay_out`. Follows no gradient."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self.bias_O = bias_O
        self._plain_OI: Tensor | None = weight_OI
        self._blocked_OI: Tensor | None = None
        self._blocked_IO: Tensor | None = None
        self._shared_OI: Tensor | None = None
        self._blocked_shift: Tensor | None = None

    @property
    def products(self) -> Products:
        return "plain" if self._blocked_OI is None else "blocked"

    @property
    def float32_copy_bytes(self) -> int:
        """What :meth:`in_float32` takes at a time of float32 copies of the weight."""
        plain_OI = self._plain_OI
        if plain_OI is None or plain_OI.dtype == torch.float32 or plain_OI.device.type == "cuda":
            return 0
        return _copy_rows(plain_OI) * self.in_features * torch.float32.itemsize

    @property
    def dequantized_bytes(self) -> int:
        """What a product takes at a time of a weight that it makes of fewer bits."""
        return 0

    def lay_out(self, products: Products, *, shared: bool = False) -> None:
        """Lay the weight out, and let go of the plain one unless it is ``shared`` with an embedding.

        A float32 weight of a model of another type stays plain.
        """
        if products == "plain" or (self._plain_OI is not None and self._plain_OI.dtype == torch.float32):
            return
        assert self._plain_OI is not None, "laid out already"
        self._blocked_OI = _blocked(self._plain_OI)
        if shared:
            self._shared_OI = self._plain_OI
        self._plain_OI = None

    def plain(self) -> Tensor:
        """The weight (out, in) as it was given; a copy where it is laid out otherwise."""
        if self._plain_OI is not None:
            return self._plain_OI
        assert self._blocked_OI is not None
        return self._blocked_OI.to_dense()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> (T, out) in the compute dtype."""
        if self._blocked_OI is None:
            assert self._plain_OI is not None
            return F.linear(x_TI, self._plain_OI, self.bias_O)
        return _product(x_TI, self._blocked_OI, self.bias_O)

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        """(T, out) -> (T, in): dy W. What only training needs is laid out when it is first asked for."""
        if self._plain_OI is not None:
            return plain_input_grad(dy_TO, self._plain_OI)
        if self._blocked_IO is None:
            assert self._blocked_OI is not None
            self._blocked_IO = _blocked(self._blocked_OI.to_dense().t().contiguous())
        return _product(dy_TO, self._blocked_IO, None)

    def in_float32(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> float32 (T, out): the sum is never rounded to the compute dtype.

        oneDNN's product of bfloat16 is summed in float32 and rounded at the end. A second one, from which the rounded
        result is subtracted before it is rounded itself, gives the rest: 16 bits of the sum in all.
        """
        if x_TI.dtype == torch.float32:
            return self(x_TI)
        if self._blocked_OI is not None:
            negative_TO = _product(x_TI, self._blocked_OI, self.bias_O).neg_()
            rest_TO = _mkldnn._linear_pointwise.binary(
                x_TI.contiguous(), negative_TO, self._blocked_OI, self.bias_O, "add"
            )
            return rest_TO.float().sub_(negative_TO)
        assert self._plain_OI is not None
        y_TO = plain_in_float32(x_TI, self._plain_OI)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)

    def up_to_a_shift(self, x_TI: Tensor, references_T: Tensor) -> Tensor:
        """float32 (T, out): x W^T less one number a row, for what only needs the distances between elements.

        Where the weight is blocked and shared, this takes one product where :meth:`in_float32` takes two: the number
        is the row's own element ``references_T``, and two more columns of x take it off the sums before these are
        rounded. So an element is known to 8 bits of its distance from the reference. Elsewhere the number is 0.
        """
        if self._blocked_OI is None or self._shared_OI is None or self.bias_O is not None:
            return self.in_float32(x_TI)
        if self._blocked_shift is None:
            more_O2 = self._shared_OI.new_ones(self.out_features, 2)
            self._blocked_shift = _blocked(_in_full_blocks(torch.cat((self._shared_OI, more_O2), dim=1)))
        reference_T1 = (x_TI.float() * self._shared_OI[references_T].float()).sum(1, keepdim=True).neg_()
        high_T1 = reference_T1.to(x_TI.dtype)
        low_T1 = (reference_T1 - high_T1.float()).to(x_TI.dtype)
        return _product(_in_full_blocks(torch.cat((x_TI, high_T1, low_T1), dim=1)), self._blocked_shift, None).float()


def _in_full_blocks(x: Tensor) -> Tensor:
    """``x`` with columns of zeros up to a multiple of 32."""
    return F.pad(x, (0, -x.shape[1] % 32))


def _blocked(weight: Tensor) -> Tensor:
    return _mkldnn._reorder_linear_weight(weight)


def _product(x_TI: Tensor, blocked_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return _mkldnn._linear_pointwise(x_TI.contiguous(), blocked_OI, bias_O, "none", [], "")


def plain_input_grad(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """(T, out) -> (T, in): dy W, in float32 summed over no more than ``MAX_SUMMANDS`` at once."""
    if dy_TO.dtype != torch.float32:
        return dy_TO @ weight_OI
    first_TO, *rest = dy_TO.split(MAX_SUMMANDS, dim=1)
    first_OI, *weights = weight_OI.split(MAX_SUMMANDS)
    dx_TI = first_TO @ first_OI
    for part_TO, part_OI in zip(rest, weights, strict=True):
        dx_TI += part_TO @ part_OI
    return dx_TI


def plain_in_float32(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """(T, in) -> float32 (T, out), of a weight in fewer bits than float32."""
    if x_TI.device.type == "cuda":
        return torch.mm(x_TI, weight_OI.t(), out_dtype=torch.float32)
    x_TI = x_TI.float()
    return torch.cat([F.linear(x_TI, part_OI.float()) for part_OI in weight_OI.split(_copy_rows(weight_OI))], dim=1)


def _copy_rows(weight_OI: Tensor) -> int:
    return min(weight_OI.shape[0], max(1, _MAX_COPY_ELEMENTS // weight_OI.shape[1]))
