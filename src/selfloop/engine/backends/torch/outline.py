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
from selfloop.engine.backends.torch.quantized_linear import Parts
from selfloop.engine.backends.torch.weights import BaseWeights, LayerWeights, allocate_layer
from selfloop.engine.models.spec import LayerSpec, ModelSpec, Projection
from selfloop.types.settings import KeptAs


class OutlineLinear(FrozenLinear):
    """A frozen weight (out, in) of which only the shape and the layout are known."""

    def __init__(
        self, one_11: Tensor, out_features: int, in_features: int, products: Products, parts: Parts | None = None
    ) -> None:
        """``one_11`` is a single number, seen as the whole weight; ``parts`` of one that is dequantised in some."""
        super().__init__(one_11.expand(out_features, in_features))
        self._products: Products = products if parts is None else "plain"
        self._parts = parts

    @property
    def products(self) -> Products:
        return self._products

    @property
    def float32_copy_bytes(self) -> int:
        return 0 if self._products == "blocked" else super().float32_copy_bytes

    @property
    def dequantized_bytes(self) -> int:
        return 0 if self._parts is None else self._parts.num_bytes

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self._given(x_TI).new_zeros(x_TI.shape[0], self.out_features)

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        dx_TI = self._given(dy_TO).new_zeros(dy_TO.shape[0], self.in_features)
        part_TI = dx_TI
        if self._parts is not None:
            # A part comes to lie beside the whole.
            part_TI = dx_TI[:, : self._parts.columns].clone()
        if self._products == "plain" and dy_TO.dtype == torch.float32:
            # The rest of the sum lies beside its beginning, as in the real product.
            for _ in range(MAX_SUMMANDS, self.out_features, MAX_SUMMANDS):
                part_TI += torch.zeros_like(part_TI)
        return dx_TI

    def _given(self, x: Tensor) -> Tensor:
        return x.contiguous() if self._products == "blocked" else x


class _OutlinePlaces(Places):
    """Places that are never filled."""

    def __init__(self, device: torch.device, dtype: torch.dtype, products: Products, kept_as: KeptAs | None) -> None:
        super().__init__(device if is_here(device) else torch.device("cpu"), dtype)
        self._products: Products = products
        self._is_quantized = kept_as is not None
        self._meant_for = device

    def inside(self, prefix: str) -> Places:
        return self

    def fused(self, projections: Sequence[Projection], dtype: torch.dtype | None = None) -> FrozenLinear:
        out, inner = sum(projection.out_features for projection in projections), projections[0].in_features
        in_parts = self._is_quantized and projections[0].adaptable
        return self.matrix(out, inner, dtype, Parts.of(out, inner, self._meant_for) if in_parts else None)

    def stacked_experts(self, name: str, each: Sequence[Sequence[Projection]]) -> list[FrozenLinear]:
        return [self.matrix(sum(p.out_features for p in own), own[0].in_features) for own in each]

    def matrix(
        self, out_features: int, in_features: int, dtype: torch.dtype | None = None, parts: Parts | None = None
    ) -> OutlineLinear:
        return OutlineLinear(self.empty(1, 1, dtype=dtype), out_features, in_features, self._products, parts)


class Outline(TorchModel):
    """Computes on the CPU where ``device`` is not there; its costs are those on ``device``."""

    def __init__(self, spec: ModelSpec, weights: BaseWeights, device: torch.device, kept_as: KeptAs | None) -> None:
        super().__init__(spec, weights, kept_as)
        self.device = device


def outline(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, products: Products, kept_as: KeptAs | None = None
) -> Outline:
    """The model of ``spec`` as it would be loaded."""
    places = _OutlinePlaces(device, dtype, products, kept_as)
    kinds: dict[LayerSpec, LayerWeights] = {}
    for index, layer in enumerate(spec.layers):
        if layer not in kinds:
            kinds[layer] = allocate_layer(layer, spec.layer_prefix(index), places)
    embedding_VD = places.empty(1, 1).expand(spec.vocab_size, spec.hidden_size)
    head, final_norm_D = places.matrix(spec.vocab_size, spec.hidden_size), places.empty(spec.hidden_size)
    layers = [kinds[layer] for layer in spec.layers]
    return Outline(spec, BaseWeights(embedding_VD, layers, final_norm_D, head), device, kept_as)
