"""The model over the cache: a pass for parts of prompts, a pass for one new token of each running sample.

By the CPU kernels both are one thing, and read pages where they lie. By PyTorch's operators a step has a way of its
own, beside a window in which running samples' keys and values lie side by side.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from selfloop.engine.backends.cpu_native.layers import TiledCache, TokenRows
from selfloop.engine.backends.torch.cached_attention import PrefillAttention, PromptChunk, StepAttentionOverCache
from selfloop.engine.backends.torch.decode_step import StepDecoder
from selfloop.engine.backends.torch.decoder import Decoder
from selfloop.engine.backends.torch.kv_buckets import KvBuckets
from selfloop.engine.kv.pages import PAGE_TOKENS, KvRows, PagePool, pages_for, storage_pages
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.sample.sequence import Sample


class CachePasses(Protocol):
    """Owns the pages of ``pool``."""

    pool: PagePool

    def prompts(self, tokens: list[int], chunks: list[PromptChunk], adapters: AdapterBatch) -> Tensor:
        """Hidden states (T, D) after the final norm of chunks one after another, which join the cache."""
        ...

    def step(self, samples: Sequence[Sample]) -> Tensor:
        """float32 logits (B, V) after each sample's newest token, which joins the cache; adapters stand together."""
        ...

    def write_back(self, sample: Sample, stop: int) -> None:
        """Bring the sample's pages up to date, as far as tokens before ``stop`` go."""
        ...

    def leave(self, sample: Sample) -> None:
        """Forget what there is of a sample beside its pages."""
        ...


def cache_passes(decoder: Decoder, num_tokens: int, window_tokens: int) -> CachePasses:
    """Over a cache of ``num_tokens``; where they use a window, it holds ``window_tokens``."""
    if decoder.kernels is not None:
        return KernelPasses(decoder, num_tokens)
    return OperatorPasses(decoder, num_tokens, window_tokens)


class KernelPasses:
    """By the CPU kernels."""

    def __init__(self, decoder: Decoder, num_tokens: int) -> None:
        self._decoder = decoder
        self._cache = TiledCache(decoder.config, decoder.config.num_layers, storage_pages(num_tokens))
        self.pool = PagePool(self._cache)

    def prompts(self, tokens: list[int], chunks: list[PromptChunk], adapters: AdapterBatch) -> Tensor:
        rows: list[TokenRows] = []
        positions: list[int] = []
        for chunk in chunks:
            self._cache.zero(chunk.pages[pages_for(chunk.start) : pages_for(chunk.stop)])
            start = len(positions)
            positions += range(chunk.start, chunk.stop)
            rows.append(TokenRows(start, len(positions), chunk.start, chunk.pages))
        return self._pass(tokens, positions, rows, adapters)

    def step(self, samples: Sequence[Sample]) -> Tensor:
        positions = [sample.position for sample in samples]
        self._cache.zero([s.pages[s.position // PAGE_TOKENS] for s in samples if s.position % PAGE_TOKENS == 0])
        rows = [TokenRows(at, at + 1, sample.position, sample.pages) for at, sample in enumerate(samples)]
        adapters = AdapterBatch.of([(1, sample.parent.adapter) for sample in samples])
        h_BD = self._pass([sample.tokens[-1] for sample in samples], positions, rows, adapters)
        return self._decoder.logits(h_BD, adapters)

    def write_back(self, sample: Sample, stop: int) -> None:
        pass

    def leave(self, sample: Sample) -> None:
        pass

    def _pass(self, tokens: list[int], positions: list[int], rows: list[TokenRows], adapters: AdapterBatch) -> Tensor:
        return self._decoder.over_cache(torch.tensor(tokens), torch.tensor(positions), rows, self._cache, adapters)


class OperatorPasses:
    """By PyTorch's operators."""

    def __init__(self, decoder: Decoder, num_tokens: int, window_tokens: int) -> None:
        self._decoder = decoder
        self._step_decoder = StepDecoder(decoder)
        config, device = decoder.config, decoder.device
        self._cache = KvRows(config, num_tokens, device, decoder.dtype)
        self.window = KvBuckets(config, self._cache, window_tokens, device, torch.float32)
        self.pool = PagePool(self._cache)

    def prompts(self, tokens: list[int], chunks: list[PromptChunk], adapters: AdapterBatch) -> Tensor:
        device = self._decoder.device
        positions = [p for c in chunks for p in range(c.start, c.stop)]
        return self._decoder.forward(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            PrefillAttention(self._cache, chunks, device),
            adapters,
        )

    def step(self, samples: Sequence[Sample]) -> Tensor:
        attention = StepAttentionOverCache(self._decoder.config, self._cache, samples, self.window.seat(samples))
        row_adapters: list[Adapter | None] = [sample.parent.adapter for sample in samples]
        return self._step_decoder.forward(
            [sample.tokens[-1] for sample in samples],
            [sample.position for sample in samples],
            attention,
            row_adapters,
        )

    def write_back(self, sample: Sample, stop: int) -> None:
        self.window.write_back(sample, stop)

    def leave(self, sample: Sample) -> None:
        self.window.leave(sample)
