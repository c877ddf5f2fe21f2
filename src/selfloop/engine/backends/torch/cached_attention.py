"""Attention over the KV cache: one strategy for prompts, one for single new tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.torch.attention import causal_attention, masked_attention
from selfloop.engine.backends.torch.kv_buckets import Seated, Shelf
from selfloop.engine.kv.pages import PAGE_TOKENS, KvRows, cell, page_table, pages_for
from selfloop.engine.models.config import ModelConfig
from selfloop.engine.sample.sequence import Sample


class PromptChunk(NamedTuple):
    """Tokens [start, stop) of a prompt whose cache is ``pages``; what is before ``start`` is cached."""

    pages: list[int]
    start: int
    stop: int


class PrefillAttention:
    """Chunks of prompts, packed one after another."""

    def __init__(self, cache: KvRows, chunks: list[PromptChunk], device: torch.device) -> None:
        self._cache = cache
        self._chunks = chunks
        cells = [cell(c.pages, position) for c in chunks for position in range(c.start, c.stop)]
        self._cells_T = torch.tensor(cells, device=device)
        self._tables = [page_table([c.pages[: pages_for(c.stop)]], device) for c in chunks]
        for chunk in chunks:
            cache.zero(chunk.pages[pages_for(chunk.start) : pages_for(chunk.stop)])

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        self._cache.write(layer, self._cells_T, k_TGd, v_TGd)
        lengths = [chunk.stop - chunk.start for chunk in self._chunks]
        parts = zip(*(x.split(lengths) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        out: list[Tensor] = []
        for chunk, table_1P, (q, k, v) in zip(self._chunks, self._tables, parts, strict=True):
            if chunk.start == 0:
                out_1HNd = causal_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
            else:
                out_1HNd = self._with_cache(layer, chunk, table_1P, q)
            out.append(out_1HNd[0].transpose(0, 1))
        return torch.cat(out)

    def _with_cache(self, layer: int, chunk: PromptChunk, table_1P: Tensor, q_NHd: Tensor) -> Tensor:
        k_1GLd, v_1GLd = (x[:, :, : chunk.stop] for x in self._cache.read(layer, table_1P))
        keys_L = torch.arange(chunk.stop, device=q_NHd.device)
        visible_NL = keys_L <= keys_L[chunk.start :, None]
        q_1HNd = q_NHd.transpose(0, 1)[None]
        return masked_attention(q_1HNd, k_1GLd, v_1GLd, visible_NL)


class StepAttentionOverCache:
    """One new token for each of B samples, whose cache has room for it; ``samples`` in the order of the rows."""

    def __init__(self, config: ModelConfig, cache: KvRows, samples: Sequence[Sample], seated: Seated) -> None:
        rows = {id(sample): row for row, sample in enumerate(samples)}
        device = cache.device
        self._parts: list[tuple[Tensor | None, _ShelfStep | _PagedStep]] = []
        for shelf in seated.shelves:
            self._add([rows[id(s)] for s in shelf.samples], len(samples), _ShelfStep(config, shelf, device), device)
        if seated.outside:
            step = _PagedStep(config, cache, seated.outside)
            self._add([rows[id(s)] for s in seated.outside], len(samples), step, device)

    def _add(self, rows: list[int], num_rows: int, step: "_ShelfStep | _PagedStep", device: torch.device) -> None:
        in_order = rows == list(range(num_rows))
        self._parts.append((None if in_order else torch.tensor(rows, device=device), step))

    def __call__(self, layer: int, qkv_BHd: Tensor) -> Tensor:
        if self._parts[0][0] is None:
            return self._parts[0][1](layer, qkv_BHd)
        out_BI = None
        for rows_N, step in self._parts:
            assert rows_N is not None
            part_NI = step(layer, qkv_BHd.index_select(0, rows_N))
            if out_BI is None:
                out_BI = part_NI.new_empty(qkv_BHd.shape[0], part_NI.shape[1])
            out_BI.index_copy_(0, rows_N, part_NI)
        assert out_BI is not None
        return out_BI


class _ShelfStep:
    """Of the samples of one shelf, in its order."""

    def __init__(self, config: ModelConfig, shelf: Shelf, device: torch.device) -> None:
        heads, groups = config.num_heads, config.num_kv_heads
        num, size = len(shelf.samples), shelf.num_tokens
        positions = [sample.position for sample in shelf.samples]
        length = max(positions) + 1
        self._heads = heads
        self._bias = None if len(set(positions)) == 1 else _bias(positions, length, device)
        # The views of all layers at once: taken one by one they would cost as much as the arithmetic.
        kv_LSXNd = shelf.kv_LSRGNd[:, :, :num, :, :length].flatten(2, 3)
        self._k_XdN = kv_LSXNd[:, 0].transpose(2, 3).unbind()
        self._v_XNd = kv_LSXNd[:, 1].unbind()
        if num == 1:
            self._new_2Gd = shelf.kv_LSRGNd[:, :, 0, :, positions[0]].unbind()
            return
        self._new_2Gd = None
        rows_B11 = torch.arange(num)[:, None, None]
        s_2 = torch.arange(2)[:, None] * shelf.num_rows
        cells_B2G = ((rows_B11 + s_2) * groups + torch.arange(groups)) * size + torch.tensor(positions)[:, None, None]
        self._cells = cells_B2G.flatten().to(device)
        self._flat_Nd = shelf.kv_LSRGNd.flatten(1, 4).unbind()

    def __call__(self, layer: int, qkv_BHd: Tensor) -> Tensor:
        q_BHd, new_BHd = qkv_BHd.tensor_split((self._heads,), dim=1)
        if self._new_2Gd is not None:
            self._new_2Gd[layer].copy_(new_BHd.view(self._new_2Gd[layer].shape))
        else:
            self._flat_Nd[layer].index_copy_(0, self._cells, new_BHd.reshape(-1, qkv_BHd.shape[2]))
        return _attend(q_BHd, self._k_XdN[layer], self._v_XNd[layer], self._bias)


class _PagedStep:
    """Of samples that only have pages: gathered anew in every layer."""

    def __init__(self, config: ModelConfig, cache: KvRows, samples: list[Sample]) -> None:
        self._heads, self._groups = config.num_heads, config.num_kv_heads
        self._cache = cache
        positions = [sample.position for sample in samples]
        self._table_BP = page_table([s.pages[: pages_for(s.position + 1)] for s in samples], cache.device)
        self._cells_B = torch.tensor([cell(s.pages, s.position) for s in samples], device=cache.device)
        self._bias = _bias(positions, self._table_BP.shape[1] * PAGE_TOKENS, cache.device)
        cache.zero([s.pages[s.position // PAGE_TOKENS] for s in samples if s.position % PAGE_TOKENS == 0])
        for sample in samples:
            sample.num_in_pages = sample.position + 1

    def __call__(self, layer: int, qkv_BHd: Tensor) -> Tensor:
        q_BHd, k_BGd, v_BGd = qkv_BHd.split([self._heads, self._groups, self._groups], dim=1)
        self._cache.write(layer, self._cells_B, k_BGd, v_BGd)
        k_XNd, v_XNd = (x.to(qkv_BHd.dtype).flatten(0, 1) for x in self._cache.read(layer, self._table_BP))
        return _attend(q_BHd, k_XNd.transpose(1, 2), v_XNd, self._bias)


def _bias(positions: list[int], length: int, device: torch.device) -> Tensor:
    """(B, 1, 1, length) float32: minus infinity after each sample's position."""
    hidden = torch.arange(length) > torch.tensor(positions)[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None].to(device)


def _attend(q_BHd: Tensor, k_XdN: Tensor, v_XNd: Tensor, bias_B11N: Tensor | None) -> Tensor:
    """(B, H, d), (B * G, d, N), (B * G, N, d) -> (B, H * d); heads that share keys are the rows of one small matrix.

    The queries are scaled already.
    """
    num = q_BHd.shape[0]
    scores_XMN = torch.bmm(q_BHd.reshape(k_XdN.shape[0], -1, q_BHd.shape[2]), k_XdN)
    if bias_B11N is not None:
        scores_XMN.unflatten(0, (num, -1)).add_(bias_B11N)
    return torch.bmm(scores_XMN.softmax(-1), v_XNd).view(num, -1)
