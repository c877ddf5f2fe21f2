"""Keys and values of running samples, side by side, so that a decode step reads them where they lie.

Pages stay the owners of memory and what is shared; a sample in the window has a copy of its own, which alone grows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.kv.pages import PAGE_TOKENS, KvRows
from selfloop.engine.models.config import ModelConfig

if TYPE_CHECKING:
    from selfloop.engine.sample.sequence import Sample

_MIN_TOKENS = 128


class Shelf:
    """Rows of ``num_tokens`` each, without gaps: row i is that of ``samples[i]``."""

    def __init__(self, config: ModelConfig, num_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_tokens = num_tokens
        self.samples: list[Sample] = []
        self._config = config
        self._empty = torch.empty((config.num_layers, 2, 0, config.num_kv_heads, num_tokens, config.head_dim))
        self.kv_LSRGNd = self._empty.to(device, dtype)

    @property
    def num_rows(self) -> int:
        return self.kv_LSRGNd.shape[2]

    @property
    def is_full(self) -> bool:
        return len(self.samples) == self.num_rows

    def widen(self, num_rows: int) -> None:
        layers, two, _, *rest = self.kv_LSRGNd.shape
        wider = self.kv_LSRGNd.new_empty((layers, two, num_rows, *rest))
        wider[:, :, : len(self.samples)] = self.kv_LSRGNd[:, :, : len(self.samples)]
        self.kv_LSRGNd = wider

    def add(self, sample: "Sample") -> Tensor:
        """Its row (L, 2, G, N, head_dim), zeroed: what is masked is multiplied by zero, and a NaN would stay one."""
        self.samples.append(sample)
        row = self.kv_LSRGNd[:, :, len(self.samples) - 1]
        return row.zero_()

    def row(self, sample: "Sample") -> Tensor:
        return self.kv_LSRGNd[:, :, self.samples.index(sample)]

    def remove(self, sample: "Sample") -> None:
        """The last row takes its place."""
        at, last = self.samples.index(sample), self.samples.pop()
        if last is not sample:
            self.samples[at] = last
            self.kv_LSRGNd[:, :, at] = self.kv_LSRGNd[:, :, len(self.samples)]


class Seated(NamedTuple):
    """The samples of a step by where their cache is; ``outside`` those for whom the window has no room."""

    shelves: list[Shelf]
    outside: "list[Sample]"


class KvBuckets:
    """Shelves for samples of about equal lengths, at most ``max_tokens`` in all."""

    def __init__(self, config: ModelConfig, cache: KvRows, max_tokens: int, device: torch.device, dtype: torch.dtype):
        self._config = config
        self._cache = cache
        self._max_tokens = max_tokens
        self._device = device
        self._dtype = dtype
        self._shelves: dict[int, Shelf] = {}

    def seat(self, samples: "Sequence[Sample]") -> Seated:
        """Make room for one more token of each."""
        outside = [sample for sample in samples if not self._has_room(sample) and not self._place(sample)]
        return Seated([shelf for shelf in self._shelves.values() if shelf.samples], outside)

    def write_back(self, sample: "Sample", stop: int) -> None:
        """Bring the pages up to date, as far as tokens before ``stop`` go."""
        if sample.shelf is not None and stop > sample.num_in_pages:
            start = sample.num_in_pages
            self._cache.zero([sample.pages[at // PAGE_TOKENS] for at in range(start, stop) if at % PAGE_TOKENS == 0])
            cells = [sample.pages[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for at in range(start, stop)]
            row = sample.shelf.row(sample)
            self._cache.write_all(torch.tensor(cells, device=self._device), row[:, :, :, start:stop])
            sample.num_in_pages = stop

    def leave(self, sample: "Sample") -> None:
        """Free the row; what was not written back is lost."""
        if sample.shelf is None:
            return
        sample.shelf.remove(sample)
        if not sample.shelf.samples:
            del self._shelves[sample.shelf.num_tokens]
        sample.shelf = None

    def _has_room(self, sample: "Sample") -> bool:
        return sample.shelf is not None and sample.position < sample.shelf.num_tokens

    def _place(self, sample: "Sample") -> bool:
        shelf = self._shelf(sample.position + 1)
        if shelf is None:
            self.write_back(sample, sample.position)
            self.leave(sample)
            return False
        row = shelf.add(sample)
        known = sample.position
        if sample.shelf is not None:
            row[:, :, :, :known] = sample.shelf.row(sample)[:, :, :, :known]
            self.leave(sample)
        else:
            self._cache.read_all(sample.pages[: -(-known // PAGE_TOKENS)], row[:, :, :, :known])
        sample.shelf = shelf
        return True

    def _shelf(self, num_tokens: int) -> Shelf | None:
        """A shelf with a free row for that many tokens, widened or made if need be."""
        size = _MIN_TOKENS
        while size < num_tokens:
            size *= 2
        shelf = self._shelves.get(size)
        if shelf is not None and not shelf.is_full:
            return shelf
        used = sum(other.num_rows * other.num_tokens for other in self._shelves.values())
        num_rows = 0 if shelf is None else shelf.num_rows
        more = min(max(num_rows, 1), (self._max_tokens - used) // size)
        if more <= 0:
            return None
        if shelf is None:
            shelf = self._shelves[size] = Shelf(self._config, size, self._device, self._dtype)
        shelf.widen(num_rows + more)
        return shelf
