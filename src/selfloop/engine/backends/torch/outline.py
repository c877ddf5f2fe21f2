"""A model without its weights: what its costs are counted on.

Products with frozen weights give zeros of the right shape, in memory that is taken as the real products take it. All
else that a layer does is computed, so one kind of layer takes a moment whatever the model's size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfloop.engine.backends.device import is_here
from selfloop.engine.backends.torch.linear import MAX_SUMMANDS, FrozenLinear, Products
from selfloop.engine.backends.torch.model import TorchModel
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.weights import BaseWeights, LayerWeights, allocate_layer
from selfloop.engine.models.spec import LayerSpec, ModelSpec, Projection


class OutlineLinear(FrozenLinear):
    """A frozen weight (out, in) of which only the shape and the layout are known."""

    def __init__(self, one_11: Tensor, out_features: int, in_features: int, products: Products) -> None:
        """``one_11`` is a single number, seen as the whole weight."""
        super().__init__(one_11.expand(out_features, in_features))
        self._products: Products = products

    @property
    def products(self) -> Products:
        return self._products

    @property
    def float32_copy_bytes(self) -> int:
        return 0 if self._products == "blocked" else super().float32_copy_bytes

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._given(x_TI).new_zeros(x_TI.shape[0], self.out_features)

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        dx_TI = self._given(dy_TO).new_zeros(dy_TO.shape[0], self.in_features)
        if self._products == "plain" and dy_TO.dtype == torch.float32:
            # The rest of the sum lies beside its beginning, as in the real product.
            for _ in range(MAX_SUMMANDS, self.out_features, MAX_SUMMANDS):
                dx_TI += torch.zeros_like(dx_TI)
        return dx_TI

    def _given(self, x: Tensor) -> Tensor:
        return x.contiguous() if self._products == "blocked" else x


class _OutlinePlaces(Places):
    """Places that are never filled."""

    def __init__(self, device: torch.device, dtype: torch.dtype, products: Products) -> None:
        super().__init__(device, dtype)
        self._products: Products = products

    def inside(self, prefix: str) -> Places:
        return self

    def fused(self, projections: Sequence[Projection], dtype: torch.dtype | None = None) -> FrozenLinear:
        sizes = [projection.out_features for projection in projections]
        return self.matrix(sum(sizes), projections[0].in_features, dtype)

    def stacked_experts(self, name: str, each: Sequence[Sequence[Projection]]) -> list[FrozenLinear]:
        return self.experts(each)

    def matrix(self, out_features: int, in_features: int, dtype: torch.dtype | None = None) -> OutlineLinear:
        return OutlineLinear(self.empty(1, 1, dtype=dtype), out_features, in_features, self._products)


class Outline(TorchModel):
    """Computes on the CPU where ``device`` is not there; its costs are those on ``device``."""

    def __init__(self, spec: ModelSpec, weights: BaseWeights, device: torch.device) -> None:
        super().__init__(spec, weights)
        self.device = device


def outline(spec: ModelSpec, device: torch.device, dtype: torch.dtype, products: Products) -> Outline:
    """The model of ``spec`` as it would be loaded."""
    places = _OutlinePlaces(device if is_here(device) else torch.device("cpu"), dtype, products)
    kinds: dict[LayerSpec, LayerWeights] = {}
    for index, layer in enumerate(spec.layers):
        if layer not in kinds:
            kinds[layer] = allocate_layer(layer, spec.layer_prefix(index), places)
    embedding_VD = places.empty(1, 1).expand(spec.vocab_size, spec.hidden_size)
    head, final_norm_D = places.matrix(spec.vocab_size, spec.hidden_size), places.empty(spec.hidden_size)
    return Outline(spec, BaseWeights(embedding_VD, [kinds[layer] for layer in spec.layers], final_norm_D, head), device)
