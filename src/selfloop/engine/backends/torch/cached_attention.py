"""Attention over the KV cache: one strategy for prompts, one for single new tokens."""

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.torch.attention import causal_attention, masked_attention
from selfloop.engine.backends.torch.kv_buckets import DenseBucket, Placed
from selfloop.engine.backends.torch.kv_rows import KvRows, cell, page_table
from selfloop.engine.kv.pages import PAGE_TOKENS, pages_for
from selfloop.engine.models.spec import FullAttention


class PrefillAttention:
    """Parts of prompts, packed one after another."""

    def __init__(self, rows: KvRows, batch: Varlen, device: torch.device) -> None:
        self._rows = rows
        self._lengths = batch.lengths
        self._starts = batch.starts
        each = list(zip(batch.slots, batch.starts, batch.stops, strict=True))
        cells = [cell(slot.pages, position) for slot, start, stop in each for position in range(start, stop)]
        self._cells_T = torch.tensor(cells, device=device)
        self._tables = [page_table([slot.pages[: pages_for(stop)]], device) for slot, _, stop in each]
        for slot, start, stop in each:
            rows.zero(slot.pages[pages_for(start) : pages_for(stop)])

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        self._rows.write(layer, self._cells_T, k_TGd, v_TGd)
        parts = zip(*(x.split(self._lengths) for x in (q_THd, k_TGd, v_TGd)), strict=True)
        out: list[Tensor] = []
        for start, table_1P, (q, k, v) in zip(self._starts, self._tables, parts, strict=True):
            if start == 0:
                out_1HNd = causal_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
            else:
                out_1HNd = self._with_cache(layer, start, table_1P, q)
            out.append(out_1HNd[0].transpose(0, 1))
        return torch.cat(out)

    def _with_cache(self, layer: int, start: int, table_1P: Tensor, q_NHd: Tensor) -> Tensor:
        stop = start + q_NHd.shape[0]
        k_1GLd, v_1GLd = (x[:, :, :stop] for x in self._rows.read(layer, table_1P))
        keys_L = torch.arange(stop, device=q_NHd.device)
        visible_NL = keys_L <= keys_L[start:, None]
        q_1HNd = q_NHd.transpose(0, 1)[None]
        return masked_attention(q_1HNd, k_1GLd, v_1GLd, visible_NL)


class StepAttentionOverCache:
    """One new token for each of B slots, whose cache has room for it; in the order of the batch."""

    def __init__(self, attention: FullAttention, rows: KvRows, batch: Varlen, placed: Placed) -> None:
        place = {slot: row for row, slot in enumerate(batch.slots)}
        positions = dict(zip(batch.slots, batch.starts, strict=True))
        device, num = rows.device, len(batch.slots)
        self._parts: list[tuple[Tensor | None, _BucketStep | _PagedStep]] = []
        for bucket in placed.buckets:
            step = _BucketStep(attention, bucket, [positions[slot] for slot in bucket.slots], device)
            self._add([place[slot] for slot in bucket.slots], num, step, device)
        if placed.outside:
            step = _PagedStep(attention, rows, placed.outside, [positions[slot] for slot in placed.outside])
            self._add([place[slot] for slot in placed.outside], num, step, device)

    def _add(self, rows: list[int], num_rows: int, step: "_BucketStep | _PagedStep", device: torch.device) -> None:
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


class _BucketStep:
    """Of the slots of one bucket, in its order."""

    def __init__(
        self, attention: FullAttention, bucket: DenseBucket, positions: list[int], device: torch.device
    ) -> None:
        heads, groups = attention.num_heads, attention.num_kv_heads
        num, size = len(bucket.slots), bucket.num_tokens
        length = max(positions) + 1
        self._heads = heads
        self._bias = None if len(set(positions)) == 1 else _bias(positions, length, device)
        # The views of all layers at once: taken one by one they would cost as much as the arithmetic.
        kv_LSXNd = bucket.kv_LSRGNd[:, :, :num, :, :length].flatten(2, 3)
        self._k_XdN = kv_LSXNd[:, 0].transpose(2, 3).unbind()
        self._v_XNd = kv_LSXNd[:, 1].unbind()
        if num == 1:
            self._new_2Gd = bucket.kv_LSRGNd[:, :, 0, :, positions[0]].unbind()
            return
        self._new_2Gd = None
        rows_B11 = torch.arange(num)[:, None, None]
        s_2 = torch.arange(2)[:, None] * bucket.num_rows
        cells_B2G = ((rows_B11 + s_2) * groups + torch.arange(groups)) * size + torch.tensor(positions)[:, None, None]
        self._cells = cells_B2G.flatten().to(device)
        self._flat_Nd = bucket.kv_LSRGNd.flatten(1, 4).unbind()

    def __call__(self, layer: int, qkv_BHd: Tensor) -> Tensor:
        q_BHd, new_BHd = qkv_BHd.tensor_split((self._heads,), dim=1)
        if self._new_2Gd is not None:
            self._new_2Gd[layer].copy_(new_BHd.view(self._new_2Gd[layer].shape))
        else:
            self._flat_Nd[layer].index_copy_(0, self._cells, new_BHd.reshape(-1, qkv_BHd.shape[2]))
        return _attend(q_BHd, self._k_XdN[layer], self._v_XNd[layer], self._bias)


class _PagedStep:
    """Of slots that only have pages: gathered anew in every layer."""

    def __init__(self, attention: FullAttention, rows: KvRows, slots: list[CacheSlot], positions: list[int]) -> None:
        self._heads, self._groups = attention.num_heads, attention.num_kv_heads
        self._rows = rows
        each = list(zip(slots, positions, strict=True))
        self._table_BP = page_table([slot.pages[: pages_for(at + 1)] for slot, at in each], rows.device)
        self._cells_B = torch.tensor([cell(slot.pages, at) for slot, at in each], device=rows.device)
        self._bias = _bias(positions, self._table_BP.shape[1] * PAGE_TOKENS, rows.device)
        rows.zero([slot.pages[at // PAGE_TOKENS] for slot, at in each if at % PAGE_TOKENS == 0])
        for slot, at in each:
            slot.num_in_pages = at + 1

    def __call__(self, layer: int, qkv_BHd: Tensor) -> Tensor:
        q_BHd, k_BGd, v_BGd = qkv_BHd.split([self._heads, self._groups, self._groups], dim=1)
        self._rows.write(layer, self._cells_B, k_BGd, v_BGd)
        k_XNd, v_XNd = (x.to(qkv_BHd.dtype).flatten(0, 1) for x in self._rows.read(layer, self._table_BP))
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
