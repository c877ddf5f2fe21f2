"""A model whose layers the CPU kernels compute."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.backends.base import Cache, CacheSlot, Contracts, Costs, Draw, Row, Scores, Varlen
from selfloop.engine.backends.cpu_native.costs import costs_of
from selfloop.engine.backends.cpu_native.draw import draw
from selfloop.engine.backends.cpu_native.layers import KernelLayers, LayerWeights, TiledCache, TokenRows
from selfloop.engine.backends.cpu_native.library import Kernels
from selfloop.engine.backends.cpu_native.linear import PanelLinear
from selfloop.engine.backends.cpu_native.logprob import score
from selfloop.engine.backends.cpu_native.sizes import Sizes, sizes_of
from selfloop.engine.backends.device import default_kv_tokens
from selfloop.engine.backends.torch.blocks.dense_mlp import DenseMlpBlock
from selfloop.engine.backends.torch.blocks.full_attention import FullAttentionBlock
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.logprob import HeadAdapter
from selfloop.engine.backends.torch.rotary import Rotary
from selfloop.engine.backends.torch.weights import BaseWeights
from selfloop.engine.backends.torch.weights import LayerWeights as TorchLayer
from selfloop.engine.kv.pages import PagePool, pages_for, storage_pages
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.lora.grouped_matmul import lora_logits
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.settings import KeptAs

CPU = torch.device("cpu")


class NativeCache:
    """Pages as the kernels read them; there is nothing beside."""

    def __init__(self, spec: ModelSpec, sizes: Sizes, dtype: torch.dtype, num_tokens: int | None) -> None:
        token_bytes = spec.cache_elements * dtype.itemsize
        if num_tokens is None:
            num_tokens = default_kv_tokens(token_bytes, spec.context, CPU)
        self.num_bytes = num_tokens * token_bytes
        self.tiles = TiledCache(sizes, sizes.num_layers, storage_pages(num_tokens), dtype)
        self.pool = PagePool(self.tiles)

    def fork(self, slot: CacheSlot, into: CacheSlot) -> None:
        pass

    def write_back(self, slot: CacheSlot, stop: int) -> None:
        pass

    def leave(self, slot: CacheSlot) -> None:
        pass


class NativeModel:
    """A row's numbers do not depend on the other rows, nor on whether it is trained, read as a prompt or drawn."""

    contracts = Contracts(batch_invariant=True)
    kept_as: KeptAs | None = None
    device = CPU

    def __init__(self, kernels: Kernels, spec: ModelSpec, weights: BaseWeights) -> None:
        """``weights`` are plain; their layers' matrices are let go of one by one."""
        sizes = sizes_of(spec)
        assert sizes is not None
        self.spec, self.dtype = spec, kernels.rows
        self.computed_by = kernels.words
        self.rotary = Rotary(spec.rope, CPU, self.dtype)
        self.embedding_VD = weights.embedding_VD
        self._kernels, self._sizes = kernels, sizes
        left = list(weights.layers)
        layers = [_converted(kernels, left.pop(0)) for _ in range(sizes.num_layers)]
        self.layers = KernelLayers(kernels, sizes, layers, weights.final_norm_D)
        self.head = _panels(kernels, weights.head)
        self._costs: Costs | None = None

    def forward(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool = False) -> Tensor:
        rotation = self.rotary(batch.positions_T)
        return self.layers.in_sequences(self._embedded(batch), rotation, batch.lengths, lora, recompute=recompute)

    def forward_cached(self, batch: Varlen, cache: Cache, lora: AdapterBatch) -> Tensor:
        assert isinstance(cache, NativeCache)
        rows: list[TokenRows] = []
        at = 0
        for slot, length, start, stop in zip(batch.slots, batch.lengths, batch.starts, batch.stops, strict=True):
            cache.tiles.zero(slot.pages[pages_for(start) : pages_for(stop)])
            rows.append(TokenRows(at, at + length, start, slot.pages))
            at += length
        return self.layers.over_cache(self._embedded(batch), self.rotary(batch.positions_T), rows, cache.tiles, lora)

    def score(self, h_ND: Tensor, targets: Tensor, num_top: int, adapter: Adapter | None) -> Scores:
        return score(h_ND, self.head, targets, num_top, HeadAdapter.of(adapter))

    def logits(self, h_ND: Tensor, lora: AdapterBatch) -> Tensor:
        return lora_logits(h_ND, self.head, lora.at_head())

    def draw(self, logits_BV: Tensor, rows: list[Row], num_tokens: int) -> Draw:
        return draw(logits_BV, rows, num_tokens)

    def make_cache(self, num_tokens: int | None) -> NativeCache:
        return NativeCache(self.spec, self._sizes, self.dtype, num_tokens)

    def costs(self) -> Costs:
        if self._costs is None:
            self._costs = costs_of(self._kernels, self.spec, self._sizes)
        return self._costs

    def _embedded(self, batch: Varlen) -> Tensor:
        return F.embedding(batch.tokens_T, self.embedding_VD).float()


def _converted(kernels: Kernels, layer: TorchLayer) -> LayerWeights:
    assert isinstance(layer.mixer, FullAttentionBlock)
    assert isinstance(layer.feed_forward, DenseMlpBlock)
    assert layer.mixer_norm_D is not None
    assert layer.feed_forward_norm_D is not None
    linears = tuple(_panels(kernels, linear) for linear in layer.linears)
    return LayerWeights(layer.mixer_norm_D, layer.feed_forward_norm_D, layer.mixer.qk_norm_Hd, linears)


def _panels(kernels: Kernels, linear: FrozenLinear) -> PanelLinear:
    return PanelLinear(kernels, linear.plain(), linear.bias_O)
