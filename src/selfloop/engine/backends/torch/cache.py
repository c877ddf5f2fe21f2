"""The cache of PyTorch's operators: pages, and beside them dense buckets for what grows."""

import torch

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.device import cache_bytes, default_bucket_tokens, default_kv_tokens
from selfloop.engine.backends.torch.cached_attention import StepAttentionOverCache
from selfloop.engine.backends.torch.kv_buckets import KvBuckets
from selfloop.engine.backends.torch.kv_rows import KvRows
from selfloop.engine.backends.torch.recurrence import PrefillRecurrence, RecurrentStates, StepRecurrence
from selfloop.engine.kv.pages import PagePool
from selfloop.engine.models.gated_delta_net import GatedDeltaNet
from selfloop.engine.models.spec import ModelSpec


class TorchCache:
    """Keys and values of layers with attention, whose heads are alike in all of them, and states of recurrent ones."""

    def __init__(self, spec: ModelSpec, num_tokens: int | None, device: torch.device, dtype: torch.dtype) -> None:
        self._layers = spec.attentions
        attention = self._layers[0]
        token_bytes = spec.cache_elements * dtype.itemsize
        if num_tokens is None:
            num_tokens = default_kv_tokens(token_bytes, spec.context, device)
        recurrent = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, GatedDeltaNet)]
        self._states = RecurrentStates(recurrent, device) if recurrent else None
        self.num_bytes = cache_bytes(num_tokens, token_bytes, spec.state_elements)
        self.rows = KvRows(len(self._layers), attention, num_tokens, device, dtype)
        in_float32 = spec.cache_elements * torch.float32.itemsize
        self.buckets = KvBuckets(
            len(self._layers), attention, self.rows, default_bucket_tokens(in_float32, device), device
        )
        self.pool = PagePool(self.rows)

    def step_attention(self, batch: Varlen) -> StepAttentionOverCache:
        """For a row of each slot, which all grow."""
        placed = self.buckets.place(batch.slots, batch.starts)
        return StepAttentionOverCache(self._layers, self.rows, batch, placed)

    def step_recurrence(self, batch: Varlen) -> StepRecurrence | None:
        """For a row of each slot; None for a model without recurrent layers."""
        return None if self._states is None else StepRecurrence(self._states, batch)

    def prefill_recurrence(self, batch: Varlen) -> PrefillRecurrence | None:
        """For parts of prompts."""
        return None if self._states is None else PrefillRecurrence(self._states, batch)

    def fork(self, slot: CacheSlot, into: CacheSlot) -> None:
        if self._states is not None:
            self._states.fork(slot, into)

    def write_back(self, slot: CacheSlot, stop: int) -> None:
        self.buckets.write_back(slot, stop)

    def leave(self, slot: CacheSlot) -> None:
        self.buckets.leave(slot)
        if self._states is not None:
            self._states.leave(slot)
