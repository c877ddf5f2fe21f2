"""Keys and values of growing sequences, side by side, so that a decode step reads them where they lie.

Pages stay the owners of memory and what is shared; a sequence in a bucket has a copy of its own, which alone grows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot
from selfloop.engine.backends.torch.kv_rows import KvRows
from selfloop.engine.kv.pages import PAGE_TOKENS
from selfloop.engine.models.spec import FullAttention

_MIN_TOKENS = 128


class DenseBucket:
    """Rows of ``num_tokens`` each, without gaps: row i is that of ``slots[i]``."""

    def __init__(self, num_layers: int, attention: FullAttention, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.slots: list[CacheSlot] = []
        empty = torch.empty((num_layers, 2, 0, attention.num_kv_heads, num_tokens, attention.head_dim))
        self.kv_LSRGNd = empty.to(device)

    @property
    def num_rows(self) -> int:
        return self.kv_LSRGNd.shape[2]

    @property
    def is_full(self) -> bool:
        return len(self.slots) == self.num_rows

    def widen(self, num_rows: int) -> None:
        layers, two, _, *rest = self.kv_LSRGNd.shape
        wider = self.kv_LSRGNd.new_empty((layers, two, num_rows, *rest))
        wider[:, :, : len(self.slots)] = self.kv_LSRGNd[:, :, : len(self.slots)]
        self.kv_LSRGNd = wider

    def add(self, slot: CacheSlot) -> Tensor:
        """Its row (L, 2, G, N, head_dim), zeroed: what is masked is multiplied by zero, and a NaN would stay one."""
        self.slots.append(slot)
        row = self.kv_LSRGNd[:, :, len(self.slots) - 1]
        return row.zero_()

    def row(self, slot: CacheSlot) -> Tensor:
        return self.kv_LSRGNd[:, :, self.slots.index(slot)]

    def remove(self, slot: CacheSlot) -> None:
        """The last row takes its place."""
        at, last = self.slots.index(slot), self.slots.pop()
        if last is not slot:
            self.slots[at] = last
            self.kv_LSRGNd[:, :, at] = self.kv_LSRGNd[:, :, len(self.slots)]


class Placed(NamedTuple):
    """The slots of a step by where their cache is; ``outside`` those for which no bucket has room."""

    buckets: list[DenseBucket]
    outside: list[CacheSlot]


class KvBuckets:
    """Buckets for sequences of about equal lengths, at most ``max_tokens`` in all, in float32."""

    def __init__(
        self, num_layers: int, attention: FullAttention, rows: KvRows, max_tokens: int, device: torch.device
    ) -> None:
        self._num_layers = num_layers
        self._attention = attention
        self._rows = rows
        self._max_tokens = max_tokens
        self._device = device
        self._buckets: dict[int, DenseBucket] = {}
        self._of: dict[CacheSlot, DenseBucket] = {}

    def place(self, slots: Sequence[CacheSlot], positions: Sequence[int]) -> Placed:
        """Make room for one more token of each, which is at its position."""
        each = zip(slots, positions, strict=True)
        outside = [slot for slot, at in each if not self._has_room(slot, at) and not self._add(slot, at)]
        return Placed([bucket for bucket in self._buckets.values() if bucket.slots], outside)

    def write_back(self, slot: CacheSlot, stop: int) -> None:
        """Bring the pages up to date, as far as tokens before ``stop`` go."""
        bucket = self._of.get(slot)
        if bucket is not None and stop > slot.num_in_pages:
            start = slot.num_in_pages
            self._rows.zero([slot.pages[at // PAGE_TOKENS] for at in range(start, stop) if at % PAGE_TOKENS == 0])
            cells = [slot.pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for at in range(start, stop)]
            self._rows.write_all(torch.tensor(cells, device=self._device), bucket.row(slot)[:, :, :, start:stop])
            slot.num_in_pages = stop

    def leave(self, slot: CacheSlot) -> None:
        """Free the row; what was not written back is lost."""
        bucket = self._of.pop(slot, None)
        if bucket is None:
            return
        bucket.remove(slot)
        if not bucket.slots:
            del self._buckets[bucket.num_tokens]

    def _has_room(self, slot: CacheSlot, position: int) -> bool:
        bucket = self._of.get(slot)
        return bucket is not None and position < bucket.num_tokens

    def _add(self, slot: CacheSlot, position: int) -> bool:
        bucket = self._bucket(position + 1)
        if bucket is None:
            self.write_back(slot, position)
            self.leave(slot)
            return False
        row = bucket.add(slot)
        before = self._of.get(slot)
        if before is not None:
            row[:, :, :, :position] = before.row(slot)[:, :, :, :position]
            self.leave(slot)
        else:
            self._rows.read_all(slot.pages[: -(-position // PAGE_TOKENS)], row[:, :, :, :position])
        self._of[slot] = bucket
        return True

    def _bucket(self, num_tokens: int) -> DenseBucket | None:
        """A bucket with a free row for that many tokens, widened or made if need be."""
        size = _MIN_TOKENS
        while size < num_tokens:
            size *= 2
        bucket = self._buckets.get(size)
        if bucket is not None and not bucket.is_full:
            return bucket
        used = sum(other.num_rows * other.num_tokens for other in self._buckets.values())
        num_rows = 0 if bucket is None else bucket.num_rows
        more = min(max(num_rows, 1), (self._max_tokens - used) // size)
        if more <= 0:
            return None
        if bucket is None:
            bucket = self._buckets[size] = DenseBucket(self._num_layers, self._attention, size, self._device)
        bucket.widen(num_rows + more)
        return bucket
