"""One new token for each growing sequence: the decoder once more, in fewer operations.

A step of few rows is short, so what counts is how many operations a layer takes, and that weights and cache are read
once and where they lie. Between the products everything is float32. The tests hold it to the decoder's own numbers.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfloop.engine.backends.base import Varlen
from selfloop.engine.backends.torch.blocks.base import float32
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.recurrence import Recurrence
from selfloop.engine.backends.torch.rotary import Rotaries, Rotations
from selfloop.engine.backends.torch.step_adapters import SharedAdapter, StackedAdapters, StepAdapters
from selfloop.engine.backends.torch.weights import BaseWeights, LayerWeights
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.grouped_matmul import LoraSegment
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.routing import Routing


class StepAttention(Protocol):
    def __call__(self, layer: int, qkv_BHd: Tensor, sinks_H: Tensor | None) -> Tensor:
        """Rotated (B, H + 2G, head_dim) float32, queries scaled as the scores are -> (B, H * head_dim) float32.

        ``sinks_H`` float32 are there where the layer has sinks.
        """
        ...


class _Norms(NamedTuple):
    """float32 copies of a layer's."""

    mixer_D: Tensor | None
    mixer_post_D: Tensor | None
    feed_forward_D: Tensor | None
    feed_forward_post_D: Tensor | None

    @classmethod
    def of(cls, layer: LayerWeights) -> "_Norms":
        mixer = (layer.mixer_norm_D, layer.mixer_post_norm_D)
        both = (*mixer, layer.feed_forward_norm_D, layer.feed_forward_post_norm_D)
        return cls(*(None if weight_D is None else float32(weight_D) for weight_D in both))


@dataclass(frozen=True, slots=True)
class _LayerStep:
    """What the blocks of one layer ask for."""

    step: "DecodeStep"
    index: int
    place: int
    rotations: Rotations
    attention: StepAttention
    rows: Recurrence | None
    adapters: StepAdapters | None
    lora: AdapterBatch
    routing: Routing | None

    @property
    def recurrence(self) -> Recurrence:
        assert self.rows is not None
        return self.rows

    def attend(self, qkv_BHd: Tensor, sinks_H: Tensor | None) -> Tensor:
        return self.attention(self.place, qkv_BHd, sinks_H)

    def project(self, group: int, linear: FrozenLinear, x_BI: Tensor) -> Tensor:
        low_BI = x_BI.to(self.step.dtype)
        y_BO = linear(low_BI)
        if self.adapters is None:
            return y_BO.float()
        if self.adapters.dtype == torch.float32:
            y_BO = y_BO.float()
            self.adapters.add(y_BO, x_BI, self.index, group)
            return y_BO
        self.adapters.add(y_BO, low_BI, self.index, group)
        return y_BO.float()

    def routed(self, chosen_BK: Tensor) -> Tensor:
        return chosen_BK if self.routing is None else self.routing.experts(self.index, chosen_BK)

    def segments(self, group: int) -> list[LoraSegment]:
        return self.lora.at(self.index, group)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.step.norm(x, weight)


class DecodeStep:
    """Hidden states of single tokens; the cache is the attention's affair."""

    def __init__(self, spec: ModelSpec, weights: BaseWeights, rotaries: Rotaries) -> None:
        self.dtype = weights.embedding_VD.dtype
        self._spec = spec
        self._weights = weights
        self._rotaries = rotaries
        self._device = weights.embedding_VD.device
        self._norms = [_Norms.of(layer) for layer in weights.layers]
        self._final_norm = float32(weights.final_norm_D)
        self._eps = torch.tensor(spec.final_norm_eps, device=self._device)
        attention = spec.attentions[0]
        # Queries are scaled as they are rotated.
        scales = [attention.score_scale] * attention.num_heads + [1.0] * attention.num_kv_heads
        self._scale_H11 = torch.tensor(scales, device=self._device)[:, None, None]
        self._shared: tuple[Adapter, SharedAdapter] | None = None
        self._stacked: StackedAdapters | None = None

    def forward(self, batch: Varlen, attention: StepAttention, rows: Recurrence | None, lora: AdapterBatch) -> Tensor:
        """h_BD in the compute dtype; rows of one adapter stand together."""
        adapters = self._adapters(lora.of_rows(len(batch.lengths)))
        h_BD = self._weights.embedded(batch.tokens_T, self._spec.embedding_scale)
        rotations = self._rotations(batch.rotary_positions)
        for index, layer in enumerate(self._weights.layers):
            place = self._spec.cache_places[index]
            at = _LayerStep(self, index, place, rotations, attention, rows, adapters, lora, batch.routing)
            spec, norms = self._spec.layers[index], self._norms[index]
            y_BD = layer.mixer.step(self._normed(h_BD, norms.mixer_D), at)
            h_BD.add_(self._normed(y_BD, norms.mixer_post_D), alpha=spec.residual_scale)
            y_BD = layer.feed_forward.step(self._normed(h_BD, norms.feed_forward_D), at)
            h_BD.add_(self._normed(y_BD, norms.feed_forward_post_D), alpha=spec.residual_scale)
        return self.norm(h_BD, self._final_norm).to(self.dtype)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm with the model's epsilon, in float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)

    def _normed(self, x_BD: Tensor, weight_D: Tensor | None) -> Tensor:
        return x_BD if weight_D is None else self.norm(x_BD, weight_D)

    def _rotations(self, positions_B: Tensor) -> Rotations:
        found: Rotations = {}
        for name, (cos, sin) in self._rotaries(positions_B).items():
            cos_BH1d = cos[:, :, None].float() * self._scale_H11
            found[name] = cos_BH1d, torch.stack((-sin, sin), dim=2).float() * self._scale_H11
        return found

    def _adapters(self, row_adapters: list[Adapter | None]) -> StepAdapters | None:
        dtype = self.dtype
        distinct = list(dict.fromkeys(adapter for adapter in row_adapters if adapter is not None))
        if not distinct:
            return None
        if len(distinct) == 1:
            self._stacked = None
            start = row_adapters.index(distinct[0])
            count = row_adapters.count(distinct[0])
            return self._one(distinct[0]).at(start, start + count, len(row_adapters))
        self._shared = None
        stacked = self._stacked
        # What is no longer needed stays in the stack as long as that is the smaller part.
        if stacked is None or stacked.dtype != dtype or not stacked.serves(distinct):
            stacked = self._stacked = StackedAdapters(distinct, [layer.groups for layer in self._spec.layers], dtype)
        return stacked.at(row_adapters, self._device)

    def _one(self, adapter: Adapter) -> SharedAdapter:
        # A CPU's small products in bfloat16 cost three times those in float32, whatever their size.
        dtype = torch.float32 if self._device.type == "cpu" else self.dtype
        if self._shared is None or self._shared[0] is not adapter:
            self._shared = adapter, SharedAdapter(adapter, dtype)
        return self._shared[1]
