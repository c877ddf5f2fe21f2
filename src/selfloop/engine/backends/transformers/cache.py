"""Sequences in a model's own cache: each alone while its prompt is read, then in groups that decode together.

A group is one cache of transformers whose rows are padded on the left to one width. It goes on as long as the same
sequences take their steps together; when one joins or leaves, those that are left are put together anew.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from selfloop.engine.backends.base import CacheSlot
from selfloop.engine.backends.device import NUM_STATES
from selfloop.engine.kv.pages import PagePool, storage_pages

_KNOWN = {
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
}
# Rows of a group are at least this part of its width: padding is never more than what is there.
_SHORTEST = 0.5


@dataclass(slots=True, eq=False)
class Group:
    """Sequences in the rows of one cache, row i of which has ``width - lengths[i]`` of padding before it.

    Args:
        slots: whose rows they are, where these rows take their steps together; empty otherwise.
        tokens: of a prompt's start, where its parts cannot follow one another.
    """

    cache: DynamicCache
    lengths: list[int]
    width: int
    slots: list[CacheSlot] = field(default_factory=list[CacheSlot])
    tokens: list[int] = field(default_factory=list[int])


@dataclass(frozen=True, slots=True)
class _Row:
    group: Group
    index: int


class _NoPages:
    """Pages are counted, so that the scheduler admits what fits; there is nothing in them."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages

    def zero(self, pages: list[int]) -> None:
        pass

    def copy_page(self, source: int, target: int) -> None:
        pass


class TransformersCache:
    """Room for ``num_tokens`` of all sequences, as a count; without ``padded`` only like lengths decode together."""

    def __init__(
        self, config: PreTrainedConfig, num_tokens: int, token_bytes: int, state_bytes: int, *, padded: bool
    ) -> None:
        self._config = config
        self.merges = can_merge(config)
        """Whether sequences can take their steps together."""
        self._shortest = _SHORTEST if padded else 1.0
        self.pool = PagePool(_NoPages(storage_pages(num_tokens)))
        self.num_bytes = round(num_tokens * token_bytes / _SHORTEST) + NUM_STATES * state_bytes
        self._rows: WeakKeyDictionary[CacheSlot, _Row] = WeakKeyDictionary()

    def fork(self, slot: CacheSlot, into: CacheSlot) -> None:
        self._rows[into] = self._rows[slot]

    def write_back(self, slot: CacheSlot, stop: int) -> None:
        pass

    def leave(self, slot: CacheSlot) -> None:
        self._rows.pop(slot, None)

    def prompt(self, slot: CacheSlot, start: int) -> Group:
        """The group of a prompt of which ``start`` tokens have been read."""
        if start == 0:
            self.replace(slot, Group(new_cache(self._config), [0], 0))
        row = self._rows[slot]
        assert row.group.lengths[row.index] == start, "a part of the prompt is missing"
        return row.group

    def replace(self, slot: CacheSlot, group: Group) -> None:
        """The slot's sequence is the only row of ``group``."""
        self._rows[slot] = _Row(group, 0)

    def groups(self, slots: Sequence[CacheSlot]) -> list[list[int]]:
        """Which of these slots decode together: those of like lengths, in their order."""
        if not self.merges:
            return [[index] for index in range(len(slots))]
        lengths = [self._length(slot) for slot in slots]
        left, parts = set(range(len(slots))), list[list[int]]()
        while left:
            longest = max(lengths[index] for index in left)
            part = sorted(index for index in left if lengths[index] >= self._shortest * longest)
            parts.append(part)
            left.difference_update(part)
        return sorted(parts)

    def together(self, slots: list[CacheSlot]) -> Group:
        """A group of exactly these."""
        current = self._rows[slots[0]].group
        if len(current.slots) == len(slots) and all(a is b for a, b in zip(current.slots, slots, strict=True)):
            return current
        rows = [self._rows[slot] for slot in slots]
        group = _merge(rows, new_cache(self._config)) if self.merges else _copy(rows)
        group.slots = slots
        for index, slot in enumerate(slots):
            self._rows[slot] = _Row(group, index)
        return group

    def _length(self, slot: CacheSlot) -> int:
        row = self._rows[slot]
        return row.group.lengths[row.index]


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    return DynamicCache(config=config)


def can_merge(config: PreTrainedConfig) -> bool:
    """Whether what its caches hold of several sequences can be told apart here; where it cannot, each has its own."""
    return all(type(layer) in _KNOWN for layer in new_cache(config).layers)


def cache_bytes(short: DynamicCache, longer: DynamicCache, num_more: int) -> tuple[int, int]:
    """What a token takes, and a sequence besides, from two caches of one sequence of which one has more tokens.

    What a window forgets is not counted off.
    """
    sizes = [sum(t.numel() * t.element_size() for layer in c.layers for t in _keys(layer)) for c in (short, longer)]
    states = sum(t.numel() * t.element_size() for layer in longer.layers for t in _states(layer))
    return -(-(sizes[1] - sizes[0]) // num_more), states


def _keys(layer: Any) -> list[Tensor]:
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return []
    assert layer.keys is not None
    assert layer.values is not None
    return [layer.keys, layer.values, *_indexer_keys(layer)]


def _indexer_keys(layer: Any) -> list[Tensor]:
    """Of a sparse attention, (B, L, d), by which it chooses what it reads."""
    keys = layer.indexer_keys if isinstance(layer, DynamicIndexedLayer) else None
    return [] if keys is None else [keys]


def _states(layer: Any) -> list[Tensor]:
    if type(layer) not in _KNOWN:
        # Whatever it holds besides keys and values, some of which may grow with a sequence, if slower.
        keys = {id(keys) for keys in _keys(layer)}
        return [tensor for tensor in _tensors(vars(layer)) if id(tensor) not in keys]
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return [state for state in states if state is not None]


def _tensors(of: object) -> list[Tensor]:
    if isinstance(of, Tensor):
        return [of]
    parts = of.values() if isinstance(of, dict) else of if isinstance(of, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _copy(rows: list[_Row]) -> Group:
    """The one row's group, with a cache of its own."""
    (row,) = rows
    group = row.group
    return Group(copy.deepcopy(group.cache), list(group.lengths), group.width)


def _merge(rows: list[_Row], into: DynamicCache) -> Group:
    """A copy of these rows in a cache of their own."""
    lengths = [row.group.lengths[row.index] for row in rows]
    width = max(lengths)
    for number, layer in enumerate(into.layers):
        sources = [row.group.cache.layers[number] for row in rows]
        if isinstance(layer, DynamicLayer) and _keys(sources[0]):
            _merge_keys(layer, sources, rows, lengths, width)
        if isinstance(layer, DynamicIndexedLayer) and _indexer_keys(sources[0]):
            _merge_indexer(layer, sources, rows, lengths, width)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            _merge_states(layer, sources, rows)
    return Group(into, lengths, width)


def _merge_keys(layer: DynamicLayer, sources: list[Any], rows: list[_Row], lengths: list[int], width: int) -> None:
    merged: list[Tensor] = []
    for kind in range(2):
        own: list[Tensor] = []
        for source, row, length in zip(sources, rows, lengths, strict=True):
            kept_1GLd = _keys(source)[kind][row.index : row.index + 1]
            num = min(length, kept_1GLd.shape[2])
            own.append(kept_1GLd[:, :, kept_1GLd.shape[2] - num :])
        longest = max(part.shape[2] for part in own)
        merged.append(torch.cat([F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in own]))
    layer.lazy_initialization(*merged)
    layer.keys, layer.values = merged
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width


def _merge_indexer(
    layer: DynamicIndexedLayer, sources: list[Any], rows: list[_Row], lengths: list[int], width: int
) -> None:
    own: list[Tensor] = []
    for source, row, length in zip(sources, rows, lengths, strict=True):
        (keys_BLd,) = _indexer_keys(source)
        own.append(F.pad(keys_BLd[row.index, keys_BLd.shape[1] - length :], (0, 0, width - length, 0)))
    merged = torch.stack(own)
    layer.lazy_initialization_indexer(merged)
    layer.indexer_keys = merged


def _merge_states(layer: LinearAttentionCacheLayerMixin, sources: list[Any], rows: list[_Row]) -> None:
    for at in range(layer.number_of_states):
        for name in ("conv_states", "recurrent_states"):
            parts = [getattr(source, name)[at] for source in sources]
            if parts[0] is None:
                continue
            own = torch.cat([part[row.index : row.index + 1] for part, row in zip(parts, rows, strict=True)])
            kind = name.removesuffix("s")
            getattr(layer, name)[at] = own
            getattr(layer, f"is_{kind}s_initialized")[at] = True
        for name in ("has_previous_state", "conv_kernel_size"):
            getattr(layer, name)[at] = getattr(sources[0], name)[at]
    layer.dtype, layer.device = sources[0].dtype, sources[0].device
