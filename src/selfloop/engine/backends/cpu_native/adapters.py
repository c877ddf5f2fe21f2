"""An adapter as the kernels read it: A and B of every projection in panels, forward and transposed."""

import torch

from selfloop.engine.backends.cpu_native.library import LANES, NUM_GROUPS, Kernels, Lora
from selfloop.engine.lora.adapter import Adapter, LoraGroup


class PackedAdapter:
    """Of an adapter in the type of rows, which must stay as it is; ``backward`` packs what only gradients need, too."""

    def __init__(self, kernels: Kernels, adapter: Adapter, *, backward: bool) -> None:
        self.scaling, self._item = adapter.scaling, kernels.rows.itemsize
        assert adapter.flat_P.dtype == kernels.rows
        self.has_backward = backward
        groups = [group for layer in adapter.layers for group in layer if group is not None]
        # An adapter of the output layer alone has none.
        self.rank = groups[0].b[0].shape[1] if groups else LANES
        self.padded_rank = -(-self.rank // LANES) * LANES
        self.max_parts = max((len(group.b) for group in groups), default=1)
        sizes = sum(self.padded_rank * (len(g.b) * g.a.shape[1] + sum(b.shape[0] for b in g.b)) for g in groups)
        self._data = torch.empty(sizes * (2 if backward else 1), dtype=kernels.rows)
        self._next = self._data.data_ptr()
        self._packs: list[tuple[int, ...]] = []
        self.table = (Lora * (len(adapter.layers) * NUM_GROUPS))()
        first = adapter.flat_P.data_ptr()
        for index, layer in enumerate(adapter.layers):
            for number, group in enumerate(layer):
                if group is not None:
                    self._add(self.table[index * NUM_GROUPS + number], group, first, backward)
        assert self._next == self._data.data_ptr() + self._data.numel() * self._item
        if self._packs:
            kernels.pack_all(torch.tensor(self._packs))

    def _add(self, lora: Lora, group: LoraGroup, first: int, backward: bool) -> None:
        num, rank, padded, inner = len(group.b), self.rank, self.padded_rank, group.a.shape[1]
        a = group.a.data_ptr()
        lora.at_a = (a - first) // self._item
        lora.a = self._take(num * padded * inner)
        if backward:
            lora.a_back = self._take(num * padded * inner)
        for part, b_OR in enumerate(group.b):
            own = a + part * rank * inner * self._item
            self._pack(own, inner, 1, rank, inner, inner // 2, lora.a + part * padded * inner * self._item)
            out = b_OR.shape[0]
            lora.at_b[part] = (b_OR.data_ptr() - first) // self._item
            lora.b[part] = self._take(padded * out)
            self._pack(b_OR.data_ptr(), rank, 1, out, rank, padded // 2, lora.b[part])
            if backward:
                # All parts follow one another in the sum over ranks, panel by panel.
                to = lora.a_back + part * padded * LANES * self._item
                self._pack(own, 1, inner, inner, rank, padded // 2, to, num * padded * LANES)
                lora.b_back[part] = self._take(padded * out)
                self._pack(b_OR.data_ptr(), 1, rank, rank, out, out // 2, lora.b_back[part])

    def _take(self, size: int) -> int:
        at = self._next
        self._next += size * self._item
        return at

    def _pack(
        self, source: int, n_stride: int, k_stride: int, n: int, k: int, pairs: int, to: int, stride: int | None = None
    ) -> None:
        self._packs.append(
            (source, n_stride, k_stride, n, k, pairs, to, pairs * 2 * LANES if stride is None else stride)
        )
