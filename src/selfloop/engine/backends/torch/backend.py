"""PyTorch's operators as a backend."""

import torch

from selfloop.engine.backends.base import Lacking, Plan
from selfloop.engine.backends.torch.blocks.base import has_block
from selfloop.engine.backends.torch.costs import costs_of
from selfloop.engine.backends.torch.linear import Products, best_products
from selfloop.engine.backends.torch.model import TorchModel
from selfloop.engine.backends.torch.outline import outline
from selfloop.engine.backends.torch.weights import load_weights, open_weights
from selfloop.engine.models.gated_delta_net import GatedDeltaNet
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import TensorSource
from selfloop.types.settings import KeptAs


class TorchBackend:
    """Computes on any device, in any type, every model of whose blocks it has the file.

    Args:
        products: what it multiplies by; None for what is best on the device.
    """

    name = "torch"

    def __init__(self, products: Products | None = None) -> None:
        self._products: Products | None = products

    def lacks(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
    ) -> Lacking | None:
        absent = sorted(kind for kind in spec.blocks() if not has_block(kind))
        if absent:
            return Lacking(f"it has no {', '.join(absent)}")
        heads = {(x.num_heads, x.num_kv_heads, x.head_dim, x.score_scale, x.softcap) for x in spec.attentions}
        if len(heads) != 1:
            return Lacking("its cache is for attention with heads that are alike in all layers")
        recurrent = {layer.mixer for layer in spec.layers if isinstance(layer.mixer, GatedDeltaNet)}
        if len(recurrent) > 1:
            return Lacking("its cache is for recurrent layers that are alike")
        return None

    def load(
        self,
        spec: ModelSpec,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        kept_as: KeptAs | None = None,
    ) -> TorchModel:
        weights = load_weights(spec, source, device, dtype, kept_as)
        products = self._products or best_products(device, dtype)
        for linear in weights.linears():
            linear.lay_out(products, shared=spec.tied and linear is weights.head)
        return TorchModel(spec, weights, kept_as)

    def plan(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None) -> Plan:
        products = self._products or best_products(device, dtype)
        return Plan(spec, device, dtype, costs_of(outline(spec, device, dtype, products, kept_as)))

    def open(self, spec: ModelSpec, source: TensorSource, dtype: torch.dtype) -> TorchModel:
        """On the CPU, each layer read when it is asked for and not kept: one pass needs the memory of one."""
        return TorchModel(spec, open_weights(spec, source, dtype))
