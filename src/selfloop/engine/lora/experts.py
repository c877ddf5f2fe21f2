"""Adapters on the experts of a mixture: each expert has an A and a B of its own, and sees the rows routed to it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.lora.grouped_matmul import LoraSegment


class ExpertSpan(NamedTuple):
    """Rows [start, stop) of those that are sorted by expert; ``segment`` is the number of theirs, None without."""

    expert: int
    segment: int | None
    start: int
    stop: int


def expert_segments(segments: Sequence[LoraSegment], spans: Sequence[ExpertSpan]) -> list[LoraSegment]:
    """The segments of a group that every expert has, each for the sorted rows of one expert.

    Args:
        segments: over the rows of a batch, with ``a`` (E, n * R, in) and ``b`` (E, out, R).
    """
    unbound = [(_each_expert(s.a), [_each_expert(b_EOR) for b_EOR in s.b]) for s in segments]
    found: list[LoraSegment] = []
    for expert, number, start, stop in spans:
        if number is not None:
            a_E, b_E = unbound[number]
            scaling = segments[number].scaling
            found.append(LoraSegment(start, stop, scaling, a_E[expert], tuple(b[expert] for b in b_E)))
    return found


def _each_expert(stack_E: Tensor) -> Sequence[Tensor]:
    if not (torch.is_grad_enabled() and stack_E.requires_grad):
        return stack_E.unbind()
    return _EachExpert.apply(stack_E)  # pyright: ignore[reportReturnType]


class _EachExpert(torch.autograd.Function):
    """The matrices of a stack; the gradient of all is put together once, and those without rows make none."""

    @staticmethod
    def forward(ctx: Any, stack_E: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stack_E)
        return stack_E.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor:
        grad_E = torch.zeros_like(*ctx.saved_tensors)
        for expert, grad in enumerate(grads):
            if grad is not None:
                grad_E[expert] = grad
        return grad_E
