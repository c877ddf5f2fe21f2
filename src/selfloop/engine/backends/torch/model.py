"""The decoder by PyTorch's operators, on any device: the reference, and what computes where nothing else does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfloop.engine.backends.base import Cache, Contracts, Costs, Draw, Row, Scores, Varlen
from selfloop.engine.backends.cpu_native.draw import draw
from selfloop.engine.backends.torch.attention import packed_attention
from selfloop.engine.backends.torch.cache import TorchCache
from selfloop.engine.backends.torch.cached_attention import PrefillAttention
from selfloop.engine.backends.torch.costs import costs_of
from selfloop.engine.backends.torch.curved_head import LogitCurve, score_curved
from selfloop.engine.backends.torch.decode_step import DecodeStep
from selfloop.engine.backends.torch.delta_rule import CHUNK
from selfloop.engine.backends.torch.linear import FrozenLinear, Products
from selfloop.engine.backends.torch.logprob import HeadAdapter, score
from selfloop.engine.backends.torch.norm import rms_norm
from selfloop.engine.backends.torch.recurrence import Mixing, Recurrence, packed_recurrence
from selfloop.engine.backends.torch.rotary import Rotaries, Rotations
from selfloop.engine.backends.torch.weights import BaseWeights
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.grouped_matmul import lora_linear, lora_logits
from selfloop.engine.models.spec import FullAttention, ModelSpec, Norm
from selfloop.engine.routing import Mixtures, Routing
from selfloop.types.settings import KeptAs

_COMPUTED_BY: dict[Products, str] = {"plain": "PyTorch's operators", "blocked": "oneDNN"}


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One layer of a pass: what its blocks ask for."""

    index: int
    place: int
    rotations: Rotations
    mixing: Mixing
    adapters: AdapterBatch
    routing: Routing | None

    @property
    def recurrence(self) -> Recurrence:
        assert self.mixing.rows is not None
        return self.mixing.rows

    def attend(
        self, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        return self.mixing.attention(self.place, spec, q_THd, k_TGd, v_TGd, sinks_H)

    def project(self, group: int, linear: FrozenLinear, x_TI: Tensor) -> Tensor:
        adapters = self.adapters
        if adapters.blocks is None:
            return lora_linear(x_TI, linear, adapters.at(self.index, group))
        blocks = zip(x_TI.split(adapters.blocks), adapters.at_each(self.index, group), strict=True)
        return torch.cat([lora_linear(x_BI, linear, segments) for x_BI, segments in blocks])

    def routed(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK if self.routing is None else self.routing.experts(self.index, chosen_TK)

    def in_blocks(self, act: Callable[..., Tensor], *each: Tensor) -> Tensor:
        adapters = self.adapters
        if adapters.blocks is None:
            return act(partial(adapters.at, self.index), *each)
        blocks = zip(adapters.each(), *(rows.split(adapters.blocks) for rows in each), strict=True)
        return torch.cat([act(partial(own.at, self.index), *rows) for own, *rows in blocks])


class TorchModel:
    """Pre-norm decoder of the spec's blocks, low-rank adapters added to every adaptable projection."""

    def __init__(self, spec: ModelSpec, weights: BaseWeights, kept_as: KeptAs | None = None) -> None:
        assert len(weights.layers) == spec.num_layers
        self.kept_as: KeptAs | None = kept_as
        self.spec = spec
        self.is_recurrent = spec.state_elements > 0
        # Where a chunk of the recurrence ends, what follows is cut into the same chunks as without the cache.
        state_tokens = CHUNK if self.is_recurrent else None
        self.contracts = Contracts(state_tokens=state_tokens, routes=Mixtures.of(spec) is not None, images=True)
        self.weights = weights
        self.device = weights.embedding_VD.device
        self.dtype = weights.embedding_VD.dtype
        kept = "" if kept_as is None else f", base weights in {kept_as}"
        self.computed_by = _COMPUTED_BY[weights.head.products] + kept
        self.rotaries = Rotaries(spec, self.device, self.dtype)
        self._curve = LogitCurve.of(spec)
        self._decode_step: DecodeStep | None = None
        self._costs: Costs | None = None

    def forward(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool = False) -> Tensor:
        """h_TD in the compute dtype; between layers it is float32."""
        rows = packed_recurrence(batch.lengths, lora.blocks) if self.is_recurrent else None
        mixing = Mixing(packed_attention(batch.lengths, lora.blocks, batch.ahead), rows)
        return self._forward(batch, mixing, lora, recompute=recompute)

    def forward_cached(self, batch: Varlen, cache: Cache, lora: AdapterBatch) -> Tensor:
        assert isinstance(cache, TorchCache)
        if not batch.slots[0].grows:
            attention = PrefillAttention(cache.rows, batch, self.device)
            return self._forward(batch, Mixing(attention, cache.prefill_recurrence(batch)), lora, recompute=False)
        if self._decode_step is None:
            self._decode_step = DecodeStep(self.spec, self.weights, self.rotaries)
        return self._decode_step.forward(batch, cache.step_attention(batch), cache.step_recurrence(batch), lora)

    def layer(
        self,
        index: int,
        h_TD: Tensor,
        rotations: Rotations,
        mixing: Mixing,
        adapters: AdapterBatch,
        routing: Routing | None = None,
    ) -> Tensor:
        """One layer: float32 h_TD in and out."""
        spec, layer = self.spec.layers[index], self.weights.layers[index]
        at = LayerRun(index, self.spec.cache_places[index], rotations, mixing, adapters, routing)
        y_TD = layer.mixer(self._normed(h_TD, layer.mixer_norm_D, spec.norms[0]), at)
        y_TD = self._normed(y_TD, layer.mixer_post_norm_D, spec.post_norms[0])
        h_TD = torch.add(h_TD, y_TD, alpha=spec.residual_scale)
        y_TD = layer.feed_forward(self._normed(h_TD, layer.feed_forward_norm_D, spec.norms[1]), at)
        y_TD = self._normed(y_TD, layer.feed_forward_post_norm_D, spec.post_norms[1])
        return torch.add(h_TD, y_TD, alpha=spec.residual_scale)

    def score(self, h_ND: Tensor, targets: Tensor, num_top: int, adapter: Adapter | None) -> Scores:
        if self._curve is not None:
            return score_curved(h_ND, self.weights.head, targets, num_top, HeadAdapter.of(adapter), self._curve)
        return score(h_ND, self.weights.head, targets, num_top, HeadAdapter.of(adapter))

    def logits(self, h_ND: Tensor, lora: AdapterBatch) -> Tensor:
        logits_NV = lora_logits(h_ND, self.weights.head, lora.at_head())
        return logits_NV if self._curve is None else self._curve(logits_NV)

    def draw(self, logits_BV: Tensor, rows: list[Row], num_tokens: int) -> Draw:
        return draw(logits_BV, rows, num_tokens)

    def make_cache(self, num_tokens: int | None) -> TorchCache:
        return TorchCache(self.spec, num_tokens, self.device, self.dtype)

    def costs(self) -> Costs:
        if self._costs is None:
            self._costs = costs_of(self)
        return self._costs

    def _forward(self, batch: Varlen, mixing: Mixing, lora: AdapterBatch, *, recompute: bool) -> Tensor:
        rotations = self.rotaries(batch.rotary_positions)
        h_TD = self.weights.embedded(batch.tokens_T, self.spec.embedding_scale)
        if batch.images is not None:
            h_TD.index_copy_(0, batch.images.rows_M, batch.images.features_MD.to(h_TD))
        for index in range(self.spec.num_layers):
            if recompute:
                rest = (h_TD, rotations, mixing, lora, batch.routing)
                h_TD = checkpoint(self.layer, index, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                h_TD = self.layer(index, h_TD, rotations, mixing, lora, batch.routing)
        return rms_norm(h_TD, self.weights.final_norm_D, self.spec.final_norm_eps).to(self.dtype)

    def _normed(self, x_TD: Tensor, weight_D: Tensor | None, norm: Norm | None) -> Tensor:
        """In the compute dtype, also where there is no norm."""
        if weight_D is None or norm is None:
            return x_TD.to(self.dtype)
        return rms_norm(x_TD, weight_D, norm.eps).to(self.dtype)
