"""Attention over the KV cache: one strategy for prompts, one for single new tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.torch.attention import attend
from selfloop.engine.backends.torch.kv_buckets import DenseBucket, Placed
from selfloop.engine.backends.torch.kv_rows import KvRows, cell, page_table
from selfloop.engine.kv.pages import PAGE_TOKENS, pages_for
from selfloop.engine.models.spec import FullAttention

Layers = Sequence[FullAttention]
"""The attention of each layer, alike but for what it sees."""


class PrefillAttention:
    """Parts of prompts, packed one after another."""

    def __init__(self, rows: KvRows, batch: Varlen, device: torch.device) -> None:
        self._rows = rows
        self._lengths = batch.lengths
        self._starts = batch.starts
        self._ahead = batch.ahead
        each = list(zip(batch.slots, batch.starts, batch.stops, strict=True))
        cells = [cell(slot.pages, position) for slot, start, stop in each for position in range(start, stop)]
        self._cells_T = torch.tensor(cells, device=device)
        self._tables = [page_table([slot.pages[: pages_for(stop)]], device) for slot, _, stop in each]
        for slot, start, stop in each:
            rows.zero(slot.pages[pages_for(start) : pages_for(stop)])

    def __call__(
        self, layer: int, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        self._rows.write(layer, self._cells_T, k_TGd, v_TGd)
        parts = zip(*(x.split(self._lengths) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        out: list[Tensor] = []
        for start, table_1P, ahead_N, (q, k, v) in zip(self._starts, self._tables, self._ahead, parts, strict=True):
            q_1HNd, k_1GNd, v_1GNd = (x.transpose(0, 1)[None] for x in (q, k, v))
            if start > 0:
                # A token before the window of the first query is seen by none.
                first = 0 if spec.window is None else max(0, start - spec.window + 1) // PAGE_TOKENS
                stop = start + q.shape[0] - first * PAGE_TOKENS
                k_1GNd, v_1GNd = (x[:, :, :stop] for x in self._rows.read(layer, table_1P[:, first:]))
            out.append(attend(spec, q_1HNd, k_1GNd, v_1GNd, sinks_H, ahead_N)[0].transpose(0, 1))
        return torch.cat(out)


class StepAttentionOverCache:
    """One new token for each of B slots, whose cache has room for it; in the order of the batch."""

    def __init__(self, layers: Layers, rows: KvRows, batch: Varlen, placed: Placed) -> None:
        place = {slot: row for row, slot in enumerate(batch.slots)}
        positions = dict(zip(batch.slots, batch.starts, strict=True))
        device, num = rows.device, len(batch.slots)
        self._parts: list[tuple[Tensor | None, _BucketStep | _PagedStep]] = []
        for bucket in placed.buckets:
            step = _BucketStep(layers, bucket, [positions[slot] for slot in bucket.slots], device)
            self._add([place[slot] for slot in bucket.slots], num, step, device)
        if placed.outside:
            step = _PagedStep(layers, rows, placed.outside, [positions[slot] for slot in placed.outside])
            self._add([place[slot] for slot in placed.outside], num, step, device)

    def _add(self, rows: list[int], num_rows: int, step: "_BucketStep | _PagedStep", device: torch.device) -> None:
        in_order = rows == list(range(num_rows))
        self._parts.append((None if in_order else torch.tensor(rows, device=device), step))

    def __call__(self, layer: int, qkv_BHd: Tensor, sinks_H: Tensor | None) -> Tensor:
        if self._parts[0][0] is None:
            return self._parts[0][1](layer, qkv_BHd, sinks_H)
        out_BI = None
        for rows_N, step in self._parts:
            assert rows_N is not None
            part_NI = step(layer, qkv_BHd.index_select(0, rows_N), sinks_H)
            if out_BI is None:
                out_BI = part_NI.new_empty(qkv_BHd.shape[0], part_NI.shape[1])
            out_BI.index_copy_(0, rows_N, part_NI)
        assert out_BI is not None
        return out_BI


class _BucketStep:
    """Of the slots of one bucket, in its order."""

    def __init__(self, layers: Layers, bucket: DenseBucket, positions: list[int], device: torch.device) -> None:
        num, size, groups = len(bucket.slots), bucket.num_tokens, layers[0].num_kv_heads
        self._heads, self._softcap = layers[0].num_heads, layers[0].softcap
        windows = [attention.window for attention in layers]
        seen = {window: _seen(bucket, positions, window, device) for window in set(windows)}
        self._seen = [seen[window].at(layer) for layer, window in enumerate(windows)]
        if num == 1:
            self._new_2Gd = bucket.kv_LSRGNd[:, :, 0, :, positions[0]].unbind()
            return
        self._new_2Gd = None
        rows_B11 = torch.arange(num)[:, None, None]
        s_2 = torch.arange(2)[:, None] * bucket.num_rows
        cells_B2G = ((rows_B11 + s_2) * groups + torch.arange(groups)) * size + torch.tensor(positions)[:, None, None]
        self._cells = cells_B2G.flatten().to(device)
        self._flat_Nd = bucket.kv_LSRGNd.flatten(1, 4).unbind()

    def __call__(self, layer: int, qkv_BHd: Tensor, sinks_H: Tensor | None) -> Tensor:
        q_BHd, new_BHd = qkv_BHd.tensor_split((self._heads,), dim=1)
        if self._new_2Gd is not None:
            self._new_2Gd[layer].copy_(new_BHd.view(self._new_2Gd[layer].shape))
        else:
            self._flat_Nd[layer].index_copy_(0, self._cells, new_BHd.reshape(-1, qkv_BHd.shape[2]))
        return _attend(q_BHd, *self._seen[layer], self._softcap, sinks_H)


class _Seen(NamedTuple):
    """Keys and values of every layer, as far as a window shows them; where rows see different parts, the bias."""

    k_XdN: tuple[Tensor, ...]
    v_XNd: tuple[Tensor, ...]
    bias_B11N: Tensor | None

    def at(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.k_XdN[layer], self.v_XNd[layer], self.bias_B11N


def _seen(bucket: DenseBucket, positions: list[int], window: int | None, device: torch.device) -> _Seen:
    """The views of all layers at once: taken one by one they would cost as much as the arithmetic."""
    num, length = len(bucket.slots), max(positions) + 1
    first = _first_seen(min(positions), window)
    kv_LSXNd = bucket.kv_LSRGNd[:, :, :num, :, first:length].flatten(2, 3)
    bias = None if len(set(positions)) == 1 else _bias(positions, [first] * num, length - first, window, device)
    return _Seen(kv_LSXNd[:, 0].transpose(2, 3).unbind(), kv_LSXNd[:, 1].unbind(), bias)


class _PagedStep:
    """Of slots that only have pages: gathered anew in every layer."""

    def __init__(self, layers: Layers, rows: KvRows, slots: list[CacheSlot], positions: list[int]) -> None:
        self._heads, self._groups, self._softcap = layers[0].num_heads, layers[0].num_kv_heads, layers[0].softcap
        self._rows = rows
        each = list(zip(slots, positions, strict=True))
        windows = [attention.window for attention in layers]
        seen = {window: _seen_pages(each, window, rows.device) for window in set(windows)}
        self._seen = [seen[window] for window in windows]
        self._cells_B = torch.tensor([cell(slot.pages, at) for slot, at in each], device=rows.device)
        rows.zero([slot.pages[at // PAGE_TOKENS] for slot, at in each if at % PAGE_TOKENS == 0])
        for slot, at in each:
            slot.num_in_pages = at + 1

    def __call__(self, layer: int, qkv_BHd: Tensor, sinks_H: Tensor | None) -> Tensor:
        q_BHd, k_BGd, v_BGd = qkv_BHd.split([self._heads, self._groups, self._groups], dim=1)
        self._rows.write(layer, self._cells_B, k_BGd, v_BGd)
        table_BP, bias_B11N = self._seen[layer]
        k_XNd, v_XNd = (x.to(qkv_BHd.dtype).flatten(0, 1) for x in self._rows.read(layer, table_BP))
        return _attend(q_BHd, k_XNd.transpose(1, 2), v_XNd, bias_B11N, self._softcap, sinks_H)


def _seen_pages(each: list[tuple[CacheSlot, int]], window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pages that hold what a window shows, and the bias of their tokens."""
    firsts = [_first_seen(at, window) // PAGE_TOKENS for _, at in each]
    pages = [slot.pages[first : pages_for(at + 1)] for (slot, at), first in zip(each, firsts, strict=True)]
    table_BP = page_table(pages, device)
    starts = [first * PAGE_TOKENS for first in firsts]
    return table_BP, _bias([at for _, at in each], starts, table_BP.shape[1] * PAGE_TOKENS, window, device)


def _first_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _bias(positions: list[int], starts: list[int], length: int, window: int | None, device: torch.device) -> Tensor:
    """(B, 1, 1, length) float32: minus infinity where a sample does not see the token so far behind its start."""
    at_B1 = torch.tensor(positions)[:, None]
    keys_BN = torch.arange(length) + torch.tensor(starts)[:, None]
    hidden = keys_BN > at_B1
    if window is not None:
        hidden |= keys_BN <= at_B1 - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None].to(device)


def _attend(
    q_BHd: Tensor,
    k_XdN: Tensor,
    v_XNd: Tensor,
    bias_B11N: Tensor | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """(B, H, d), (B * G, d, N), (B * G, N, d) -> (B, H * d); heads that share keys are the rows of one small matrix.

    The queries are scaled already.
    """
    num = q_BHd.shape[0]
    scores_XMN = torch.bmm(q_BHd.reshape(k_XdN.shape[0], -1, q_BHd.shape[2]), k_XdN)
    if softcap is not None:
        scores_XMN.div_(softcap).tanh_().mul_(softcap)
    if bias_B11N is not None:
        scores_XMN.unflatten(0, (num, -1)).add_(bias_B11N)
    if sinks_H is not None:
        sinks_XM1 = sinks_H.view(1, -1, scores_XMN.shape[1], 1).expand(num, -1, -1, -1).flatten(0, 1)
        weights_XMN = torch.cat((scores_XMN, sinks_XM1), dim=-1).softmax(-1)[..., :-1]
        return torch.bmm(weights_XMN, v_XNd).view(num, -1)
    return torch.bmm(scores_XMN.softmax(-1), v_XNd).view(num, -1)
