"""A frozen weight that the kernels multiply by."""

from torch import Tensor

from selfloop.engine.backends.cpu_native.library import Kernels
from selfloop.engine.backends.cpu_native.panels import Panels


class PanelLinear:
    """y = x W^T + bias with W (out, in), which is given plain and not kept. Follows no gradient.

    A row's numbers do not depend on how many others there are.
    """

    def __init__(self, kernels: Kernels, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self.bias_O = bias_O
        self.panels = Panels(kernels, weight_OI)
        self._kernels = kernels
        self._panels_IO: Panels | None = None

    def backward_panels(self) -> Panels:
        """W^T in panels, made when it is first asked for."""
        if self._panels_IO is None:
            self._panels_IO = Panels(self._kernels, self.panels.dense().t())
        return self._panels_IO

    def plain(self) -> Tensor:
        """A copy (out, in) as it was given."""
        return self.panels.dense()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> (T, out) in the compute dtype."""
        return self.in_float32(x_TI).to(x_TI.dtype)

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        """(T, out) -> (T, in): dy W. What only training needs is laid out when it is first asked for."""
        return self.backward_panels().multiply(dy_TO).to(dy_TO.dtype)

    def in_float32(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> float32 (T, out): the sum is never rounded to the compute dtype."""
        y_TO = self.panels.multiply(x_TI)
        return y_TO if self.bias_O is None else y_TO.add_(self.bias_O)
