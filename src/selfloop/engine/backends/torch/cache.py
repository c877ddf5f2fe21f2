"""The cache of PyTorch's operators: pages, and beside them dense buckets for what grows."""

import torch

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.device import default_bucket_tokens, default_kv_tokens
from selfloop.engine.backends.torch.cached_attention import StepAttentionOverCache
from selfloop.engine.backends.torch.kv_buckets import KvBuckets
from selfloop.engine.backends.torch.kv_rows import KvRows
from selfloop.engine.kv.pages import PagePool
from selfloop.engine.models.spec import FullAttention, ModelSpec


class TorchCache:
    """Keys and values of models whose every mixer is attention, with heads that are alike in all layers."""

    def __init__(self, spec: ModelSpec, num_tokens: int | None, device: torch.device, dtype: torch.dtype) -> None:
        self._layers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, FullAttention)]
        assert len(self._layers) == spec.num_layers
        attention = self._layers[0]
        token_bytes = spec.cache_elements * dtype.itemsize
        if num_tokens is None:
            num_tokens = default_kv_tokens(token_bytes, spec.context, device)
        self.num_bytes = num_tokens * token_bytes
        self.rows = KvRows(spec.num_layers, attention, num_tokens, device, dtype)
        in_float32 = spec.cache_elements * torch.float32.itemsize
        self.buckets = KvBuckets(
            spec.num_layers, attention, self.rows, default_bucket_tokens(in_float32, device), device
        )
        self.pool = PagePool(self.rows)

    def step_attention(self, batch: Varlen) -> StepAttentionOverCache:
        """For a row of each slot, which all grow."""
        placed = self.buckets.place(batch.slots, batch.starts)
        return StepAttentionOverCache(self._layers, self.rows, batch, placed)

    def fork(self, slot: CacheSlot, into: CacheSlot) -> None:
        pass

    def write_back(self, slot: CacheSlot, stop: int) -> None:
        self.buckets.write_back(slot, stop)

    def leave(self, slot: CacheSlot) -> None:
        self.buckets.leave(slot)
