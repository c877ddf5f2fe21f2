"""A frozen projection plus low-rank adapters, each on its own rows of the batch.

y = x W^T + bias + scaling * (x A^T) B^T, with W fused over n projections and A stacked likewise.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear(Protocol):
    """A frozen weight W (out, in) with its bias, in whatever layout. Follows no gradient."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> (T, out) in the compute dtype."""
        ...

    def input_grad(self, dy_TO: Tensor) -> Tensor:
        """(T, out) -> (T, in): dy W."""
        ...

    def in_float32(self, x_TI: Tensor) -> Tensor:
        """(T, in) -> float32 (T, out): the sum is never rounded to the compute dtype."""
        ...


class LoraSegment(NamedTuple):
    """Rows [start, stop) get the adapter ``a`` (n * R, in), ``b`` n times (out_i, R)."""

    start: int
    stop: int
    scaling: float
    a: Tensor
    b: tuple[Tensor, ...]


def lora_linear(x_TI: Tensor, linear: Linear, segments: list[LoraSegment]) -> Tensor:
    """(T, in) -> (T, sum of out). Gradients reach x and the adapters, never the frozen weight."""
    if not torch.is_grad_enabled():
        return _forward(x_TI, linear, segments)[0]
    parameters = [tensor for segment in segments for tensor in (segment.a, *segment.b)]
    return _LoraLinear.apply(x_TI, linear, segments, *parameters)  # pyright: ignore[reportReturnType]


def lora_logits(h_ND: Tensor, head: Linear, segments: list[LoraSegment]) -> Tensor:
    """(N, D) -> float32 (N, V), summed in float32; follows no gradient."""
    logits_NV = head.in_float32(h_ND)
    for start, stop, scaling, a_RD, (b_VR,) in segments:
        add_low_rank(logits_NV[start:stop], F.linear(h_ND[start:stop], a_RD), b_VR, scaling)
    return logits_NV


def add_low_rank(logits_CV: Tensor, u_CR: Tensor, b_VR: Tensor, scaling: float) -> Tensor:
    """Add ``scaling`` * u B^T in float32, in place."""
    return logits_CV.addmm_(u_CR.float(), b_VR.float().t(), alpha=scaling)


def _forward(x_TI: Tensor, linear: Linear, segments: list[LoraSegment]) -> tuple[Tensor, list[Tensor]]:
    y_TO = linear(x_TI)
    low_ranks: list[Tensor] = []
    for segment in segments:
        u_TR = F.linear(x_TI[segment.start : segment.stop], segment.a)
        for columns, ranks, b_OR in _parts(segment):
            y_TO[segment.start : segment.stop, columns].addmm_(u_TR[:, ranks], b_OR.t(), alpha=segment.scaling)
        low_ranks.append(u_TR)
    return y_TO, low_ranks


def _parts(segment: LoraSegment) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each fused projection: its columns of y, its columns of x A^T, its B."""
    rank, column = segment.b[0].shape[1], 0
    for index, b_OR in enumerate(segment.b):
        yield slice(column, column + b_OR.shape[0]), slice(index * rank, (index + 1) * rank), b_OR
        column += b_OR.shape[0]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        linear: Linear,
        segments: list[LoraSegment],
        *parameters: Tensor,
    ) -> Tensor:
        y_TO, low_ranks = _forward(x_TI, linear, segments)
        ctx.linear = linear
        ctx.save_for_backward(x_TI, *parameters, *low_ranks)
        ctx.spans = [(s.start, s.stop, s.scaling, len(s.b)) for s in segments]
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *rest = ctx.saved_tensors
        dy_TO = grads[0]
        dx_TI = ctx.linear.input_grad(dy_TO) if ctx.needs_input_grad[0] else None
        low_ranks = rest[len(rest) - len(ctx.spans) :]
        tensors = iter(rest)
        parameter_grads: list[Tensor] = []
        for (start, stop, scaling, num), u_TR in zip(ctx.spans, low_ranks, strict=True):
            segment = LoraSegment(start, stop, scaling, next(tensors), tuple(next(tensors) for _ in range(num)))
            du_TR, b_grads = _low_rank_grads(dy_TO[start:stop], u_TR, segment)
            parameter_grads += [du_TR.t() @ x_TI[start:stop], *b_grads]
            if dx_TI is not None:
                dx_TI[start:stop].addmm_(du_TR, segment.a)
        return dx_TI, None, None, *parameter_grads


def _low_rank_grads(dy_TO: Tensor, u_TR: Tensor, segment: LoraSegment) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x A^T (rows, n * R) and of each B."""
    du_TR = torch.empty_like(u_TR)
    b_grads: list[Tensor] = []
    for columns, ranks, b_OR in _parts(segment):
        torch.mm(dy_TO[:, columns], b_OR, out=du_TR[:, ranks])
        b_grads.append((dy_TO[:, columns].t() @ u_TR[:, ranks]).mul_(segment.scaling))
    return du_TR.mul_(segment.scaling), b_grads
