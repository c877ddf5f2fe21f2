"""The adapters of a decode step, laid out so that many rows of many adapters take few operations."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter, LoraGroup
from selfloop.engine.models.spec import ProjectionGroup


class StepAdapters(Protocol):
    """Adds what the adapters of a batch's rows contribute to a projection."""

    @property
    def dtype(self) -> torch.dtype: ...

    def add(self, y_BO: Tensor, x_BI: Tensor, layer: int, group: int) -> None:
        """Add to ``y_BO`` in place; both are in ``dtype``."""
        ...


class _Group(NamedTuple):
    """One group of n fused projections: ``a`` (in, n * R), of each its B (R, out) and the size of that out.

    With S adapters side by side both have that dimension first, and their scaling is in B already.
    """

    a: Tensor
    bs: list[Tensor]
    sizes: list[int]

    def parts(self, y: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each projection its columns of y, its columns of x A^T, its B."""
        if len(self.bs) == 1:
            return iter([(y, u, self.bs[0])])
        return zip(y.split(self.sizes, dim=-1), u.chunk(len(self.bs), dim=-1), self.bs, strict=True)


class SharedAdapter:
    """One adapter for the rows [start, stop) of a step; it is given in any type and held in ``dtype``."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows: slice | None = None
        self._scaling = adapter.scaling
        self._layers = [[_single(group, dtype) for group in layer] for layer in adapter.layers]

    def at(self, start: int, stop: int, num_rows: int) -> "SharedAdapter":
        """Use it for these of ``num_rows`` rows from now on."""
        self.rows = None if stop - start == num_rows else slice(start, stop)
        return self

    def add(self, y_BO: Tensor, x_BI: Tensor, layer: int, group: int) -> None:
        held = self._layers[layer][group]
        if held is None:
            return
        if self.rows is not None:
            y_BO, x_BI = y_BO[self.rows], x_BI[self.rows]
        for part_BO, u_BR, b_RO in held.parts(y_BO, torch.mm(x_BI, held.a)):
            part_BO.addmm_(u_BR, b_RO, alpha=self._scaling)


def _single(group: LoraGroup | None, dtype: torch.dtype) -> _Group | None:
    if group is None or group.a.dim() == 3:
        return None  # experts multiply by themselves
    bs = [b_OR.to(dtype).t() for b_OR in group.b]
    return _Group(group.a.to(dtype).t(), bs, [b_RO.shape[1] for b_RO in bs])


class StackedAdapters:
    """S adapters side by side, of any ranks and targets: what one lacks is zero.

    Rows are dealt to the adapters in equal numbers, some of them padding, so that one batched product serves all.
    """

    def __init__(self, adapters: list[Adapter], layers: list[tuple[ProjectionGroup, ...]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.places = {id(adapter): place for place, adapter in enumerate(adapters)}
        self._adapters = adapters  # keeps their ids their own
        self._layers = [
            [_stack(adapters, layer, index, group, dtype) for index, group in enumerate(groups)]
            for layer, groups in enumerate(layers)
        ]
        self._deal: Tensor | None = None
        self._rows = self._cells = torch.empty(0)

    def serves(self, adapters: list[Adapter]) -> bool:
        """Whether it holds all of these, and not many others."""
        return 2 * len(adapters) >= len(self.places) and all(id(adapter) in self.places for adapter in adapters)

    def at(self, row_adapters: list[Adapter | None], device: torch.device) -> "StackedAdapters":
        """Use them for these rows from now on."""
        lists: list[list[int]] = [[] for _ in self._adapters]
        for row, adapter in enumerate(row_adapters):
            if adapter is not None:
                lists[self.places[id(adapter)]].append(row)
        width = max(len(rows) for rows in lists)
        dealt = [rows + [0] * (width - len(rows)) for rows in lists]
        cells = [place * width + at for place, rows in enumerate(lists) for at in range(len(rows))]
        rows = [row for rows in lists for row in rows]
        self._width = width
        in_order = rows == list(range(len(lists) * width)) == cells and len(rows) == len(row_adapters)
        self._deal = None if in_order else torch.tensor(dealt, device=device).flatten()
        self._rows, self._cells = torch.tensor(rows, device=device), torch.tensor(cells, device=device)
        return self

    def add(self, y_BO: Tensor, x_BI: Tensor, layer: int, group: int) -> None:
        stack = self._layers[layer][group]
        if stack is None:
            return
        x_SWI = (x_BI if self._deal is None else x_BI.index_select(0, self._deal)).unflatten(0, (-1, self._width))
        for part_BO, u_SWR, b_SRO in stack.parts(y_BO, torch.bmm(x_SWI, stack.a)):
            more_NO = torch.bmm(u_SWR, b_SRO).flatten(0, 1)
            if self._deal is None:
                part_BO.add_(more_NO)
            else:
                part_BO.index_add_(0, self._rows, more_NO.index_select(0, self._cells))


def _stack(
    adapters: list[Adapter], layer: int, index: int, group: ProjectionGroup, dtype: torch.dtype
) -> _Group | None:
    if group.num_experts is not None:
        return None  # experts multiply by themselves
    held = [adapter.layers[layer][index] for adapter in adapters]
    ranks = [part.b[0].shape[1] for part in held if part is not None]
    if not ranks:
        return None
    rank, num = max(ranks), len(group.projections)
    device = next(part.a.device for part in held if part is not None)
    a_SnRI = torch.zeros(len(adapters), num, rank, group.in_features, dtype=dtype, device=device)
    bs = [torch.zeros(len(adapters), size, rank, dtype=dtype, device=device) for size in group.out_sizes]
    for place, (adapter, part) in enumerate(zip(adapters, held, strict=True)):
        if part is not None:
            own = part.b[0].shape[1]
            a_SnRI[place, :, :own] = part.a.unflatten(0, (num, own))
            for b_SOR, b_OR in zip(bs, part.b, strict=True):
                b_SOR[place, :, :own] = b_OR * adapter.scaling
    return _Group(a_SnRI.flatten(1, 2).transpose(1, 2), [b_SOR.transpose(1, 2) for b_SOR in bs], group.out_sizes)
