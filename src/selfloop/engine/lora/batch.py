"""Which rows of a packed batch go through which adapter."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from selfloop.engine.lora.adapter import Adapter, LoraGroup
from selfloop.engine.lora.grouped_matmul import LoraSegment


class AdapterRows(NamedTuple):
    """Rows [start, stop) of the batch use ``adapter``."""

    start: int
    stop: int
    adapter: Adapter


class AdapterBatch:
    """Disjoint row ranges with their adapters; rows in no range see the base model only.

    ``blocks`` are the sizes of row blocks that are to be multiplied each by itself, so that the numbers of none can
    depend on what else is there; None where all rows go through one product. Then ``rows`` are those blocks.
    """

    def __init__(self, rows: list[AdapterRows], blocks: list[int] | None = None) -> None:
        assert all(a.stop <= b.start for a, b in itertools.pairwise(rows)), "ranges overlap"
        assert blocks is None or blocks == [row.stop - row.start for row in rows]
        self.rows = rows
        self.blocks = blocks

    @classmethod
    def batch_invariant(cls, runs: list[tuple[int, Adapter]]) -> "AdapterBatch":
        """As :meth:`of`, each run in a product of its own."""
        stops = list(itertools.accumulate(size for size, _ in runs))
        rows = [AdapterRows(stop - size, stop, adapter) for stop, (size, adapter) in zip(stops, runs, strict=True)]
        return cls(rows, [size for size, _ in runs])

    @classmethod
    def of(cls, runs: Sequence[tuple[int, Adapter | None]]) -> "AdapterBatch":
        """From (number of rows, adapter) one after another; neighbours of one adapter are joined."""
        rows: list[AdapterRows] = []
        start = 0
        for num_rows, adapter in runs:
            if adapter is not None:
                if rows and rows[-1].stop == start and rows[-1].adapter is adapter:
                    start_before = rows.pop().start
                    rows.append(AdapterRows(start_before, start + num_rows, adapter))
                else:
                    rows.append(AdapterRows(start, start + num_rows, adapter))
            start += num_rows
        return cls(rows)

    def of_rows(self, num_rows: int) -> list[Adapter | None]:
        """The adapter of each of so many rows."""
        adapters: list[Adapter | None] = [None] * num_rows
        for start, stop, adapter in self.rows:
            adapters[start:stop] = [adapter] * (stop - start)
        return adapters

    def at(self, layer: int, group: int) -> list[LoraSegment]:
        """The segments for one fused projection of one layer."""
        return self._segments(lambda adapter: adapter.layers[layer][group])

    def at_each(self, layer: int, group: int) -> list[list[LoraSegment]]:
        """The segments of each block, which count its own rows."""
        return [block.at(layer, group) for block in self.each()]

    def each(self) -> "list[AdapterBatch]":
        """Each block by itself."""
        return [AdapterBatch.of([(row.stop - row.start, row.adapter)]) for row in self.rows]

    def at_head(self) -> list[LoraSegment]:
        """The segments for the output layer."""
        return self._segments(lambda adapter: adapter.head)

    def _segments(self, group_of: Callable[[Adapter], LoraGroup | None]) -> list[LoraSegment]:
        return [
            LoraSegment(start, stop, adapter.scaling, *group)
            for start, stop, adapter in self.rows
            if (group := group_of(adapter)) is not None
        ]
