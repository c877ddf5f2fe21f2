"""Attention over the KV cache: one strategy for prompts, one for single new tokens."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.models.attention import causal_attention
from selfloop.engine.sample.kv_cache import PAGE_TOKENS, PagePool, cell, page_table, pages_for


class PromptChunk(NamedTuple):
    """Tokens [start, stop) of a prompt whose cache is ``pages``; what is before ``start`` is cached."""

    pages: list[int]
    start: int
    stop: int


class PrefillAttention:
    """Chunks of prompts, packed one after another."""

    def __init__(self, pool: PagePool, chunks: list[PromptChunk], device: torch.device) -> None:
        self._pool = pool
        self._chunks = chunks
        cells = [cell(c.pages, position) for c in chunks for position in range(c.start, c.stop)]
        self._cells_T = torch.tensor(cells, device=device)
        self._tables = [page_table([c.pages[: pages_for(c.stop)]], device) for c in chunks]
        for chunk in chunks:
            pool.zero(chunk.pages[pages_for(chunk.start) : pages_for(chunk.stop)])

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        self._pool.write(layer, self._cells_T, k_TGd, v_TGd)
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
        k_1GLd, v_1GLd = (x[:, :, : chunk.stop] for x in self._pool.read(layer, table_1P))
        keys_L = torch.arange(chunk.stop, device=q_NHd.device)
        visible_NL = keys_L <= keys_L[chunk.start :, None]
        q_1HNd = q_NHd.transpose(0, 1)[None]
        return F.scaled_dot_product_attention(
            q_1HNd, k_1GLd, v_1GLd, attn_mask=visible_NL, enable_gqa=q_NHd.shape[1] != k_1GLd.shape[1]
        )


class DecodeAttention:
    """One new token for each of B sequences, at ``positions``; all that precede it are cached."""

    def __init__(self, pool: PagePool, pages: list[list[int]], positions: list[int], device: torch.device) -> None:
        self._pool = pool
        tables = [p[: pages_for(n + 1)] for p, n in zip(pages, positions, strict=True)]
        self._table_BP = page_table(tables, device)
        cells = [cell(p, n) for p, n in zip(pages, positions, strict=True)]
        self._cells_B = torch.tensor(cells, device=device)
        keys_L = torch.arange(self._table_BP.shape[1] * PAGE_TOKENS, device=device)
        self._visible_B11L = (keys_L <= torch.tensor(positions, device=device)[:, None])[:, None, None]
        pool.zero([p[n // PAGE_TOKENS] for p, n in zip(pages, positions, strict=True) if n % PAGE_TOKENS == 0])

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        self._pool.write(layer, self._cells_B, k_TGd, v_TGd)
        k_BGLd, v_BGLd = self._pool.read(layer, self._table_BP)
        # Heads that share keys are the rows of one small matrix, so nothing is repeated.
        q_BGNd = q_THd.unflatten(1, (k_TGd.shape[1], -1))
        out_BGNd = F.scaled_dot_product_attention(q_BGNd, k_BGLd, v_BGLd, attn_mask=self._visible_B11L)
        return out_BGNd.flatten(1, 2)
