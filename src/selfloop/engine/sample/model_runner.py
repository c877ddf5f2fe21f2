"""The model over its cache: a pass for parts of prompts, a pass for one new token of each running sample."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import Cache, CacheSlot, Model, Varlen
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.sample.sequence import Sample


class PromptChunk(NamedTuple):
    """Tokens [start, stop) of a prompt whose cache is ``slot``; what is before ``start`` is cached."""

    slot: CacheSlot
    start: int
    stop: int


class ModelRunner:
    """Builds the batches of a model and its cache."""

    def __init__(self, model: Model, num_tokens: int | None) -> None:
        """Over a cache of ``num_tokens``; None for what suits the device."""
        self.model = model
        self.cache: Cache = model.make_cache(num_tokens)

    def prefill(self, tokens: list[int], chunks: list[PromptChunk], lora: AdapterBatch) -> Tensor:
        """h_TD of chunks one after another, which join the cache."""
        slots, starts = [chunk.slot for chunk in chunks], [chunk.start for chunk in chunks]
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        return self.model.forward_cached(Varlen(self._ids(tokens), lengths, starts, slots), self.cache, lora)

    def decode(self, samples: Sequence[Sample]) -> Tensor:
        """float32 logits (B, V) after each sample's newest token, which joins the cache; adapters stand together."""
        lora = AdapterBatch.of([(1, sample.parent.adapter) for sample in samples])
        starts, slots = [sample.position for sample in samples], [sample.slot for sample in samples]
        tokens_B = self._ids([sample.tokens[-1] for sample in samples])
        batch = Varlen(tokens_B, [1] * len(samples), starts, slots)
        return self.model.logits(self.model.forward_cached(batch, self.cache, lora), lora)

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self.model.device)
