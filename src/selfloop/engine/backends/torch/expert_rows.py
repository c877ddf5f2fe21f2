"""The rows of a batch once for each of their experts, sorted so that those of one expert lie together."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.lora.experts import ExpertSpan
from selfloop.engine.lora.grouped_matmul import LoraSegment


class ExpertRows:
    """T rows of a batch are N = T * K sorted ones: by expert, and those of one expert as they are in the batch.

    Args:
        experts_TK: numbers of each row's experts, ascending and none of them twice.
        segments: ranges of the batch's rows that go through one adapter, in their order.
    """

    def __init__(self, experts_TK: Tensor, num_experts: int, segments: Sequence[LoraSegment]) -> None:
        self._experts_TK = experts_TK
        self._num_experts = num_experts
        self._segments = segments
        order_N = experts_TK.flatten().argsort(stable=True)
        self.rows_N = order_N // experts_TK.shape[1]
        self.places_TK = torch.empty_like(order_N)
        self.places_TK[order_N] = torch.arange(len(order_N), device=order_N.device)
        self.places_TK = self.places_TK.view_as(experts_TK)
        self._order_N = order_N

    @cached_property
    def spans(self) -> list[ExpertSpan]:
        """Sorted rows of one expert and one segment, or of none; all of them, one after another."""
        num_rows = self._experts_TK.shape[0]
        edges = sorted({0, num_rows, *(edge for s in self._segments for edge in (s.start, s.stop))})
        parts = [self._experts_TK[start:stop].flatten() for start, stop in pairwise(edges)]
        counts_EP = torch.stack([part.bincount(minlength=self._num_experts) for part in parts], dim=1)
        number = {segment.start: index for index, segment in enumerate(self._segments)}
        segment_of = [number.get(start) for start in edges[:-1]]
        cells_M = counts_EP.flatten().nonzero()[:, 0]
        found_M2 = torch.stack((cells_M, counts_EP.flatten().cumsum(0)[cells_M]), dim=1)
        spans: list[ExpertSpan] = []
        start = 0
        for cell, stop in found_M2.tolist():
            expert, part = divmod(cell, len(parts))
            spans.append(ExpertSpan(expert, segment_of[part], start, stop))
            start = stop
        return spans

    @cached_property
    def of_experts(self) -> list[tuple[int, int, int]]:
        """(expert, start, stop) of the sorted rows of each expert that has any."""
        found: list[tuple[int, int, int]] = []
        for expert, _, start, stop in self.spans:
            if found and found[-1][0] == expert:
                start = found.pop()[1]
            found.append((expert, start, stop))
        return found

    def spread(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (N, D)."""
        return _Spread.apply(x_TD, self.rows_N, self.places_TK)  # pyright: ignore[reportReturnType]

    def spread_weights(self, weights_TK: Tensor) -> Tensor:
        """Each row's weights of its experts, (N, 1)."""
        return weights_TK.flatten().index_select(0, self._order_N)[:, None]

    def added(self, y_ND: Tensor) -> Tensor:
        """(N, D) -> (T, D): what a row's experts give, in the order of their numbers whatever else is in the batch."""
        return _Added.apply(y_ND, self.rows_N, self.places_TK)  # pyright: ignore[reportReturnType]


class SortedExperts:
    """One projection of all experts as a matrix for sorted rows, each of which goes through its expert's."""

    def __init__(self, linears: Sequence[FrozenLinear], rows: ExpertRows) -> None:
        self._linears = linears
        self._rows = rows

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO = x_TI.new_empty(x_TI.shape[0], self._linears[0].out_features)
        for expert, start, stop in self._rows.of_experts:
            y_TO[start:stop] = self._linears[expert](x_TI[start:stop])
        return y_TO

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        dx_TI = dy_TO.new_empty(dy_TO.shape[0], self._linears[0].in_features)
        for expert, start, stop in self._rows.of_experts:
            dx_TI[start:stop] = self._linears[expert].input_grad(dy_TO[start:stop])
        return dx_TI

    def in_float32(self, x_TI: Tensor) -> Tensor:
        y_TO = x_TI.new_empty(x_TI.shape[0], self._linears[0].out_features, dtype=torch.float32)
        for expert, start, stop in self._rows.of_experts:
            y_TO[start:stop] = self._linears[expert].in_float32(x_TI[start:stop])
        return y_TO


def _sum(y_ND: Tensor, places_TK: Tensor) -> Tensor:
    # Not by an operator that sums, whose order may depend on how many rows there are.
    first_T, *rest = places_TK.unbind(1)
    sum_TD = y_ND[first_T]
    for places_T in rest:
        sum_TD += y_ND[places_T]
    return sum_TD


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return x_TD[rows_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grads[0], *ctx.saved_tensors), None, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, rows_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        return _sum(y_ND, places_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows_N,) = ctx.saved_tensors
        return grads[0][rows_N], None, None
