"""Adapters on the experts of a mixture: each expert has an A and a B of its own, and sees the rows routed to it."""

from collections.abc import Sequence
from typing import NamedTuple

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
    # Unbound once: the gradient of all experts is then put together once.
    unbound = [(s.a.unbind(), [b_EOR.unbind() for b_EOR in s.b]) for s in segments]
    found: list[LoraSegment] = []
    for expert, number, start, stop in spans:
        if number is not None:
            a_E, b_E = unbound[number]
            scaling = segments[number].scaling
            found.append(LoraSegment(start, stop, scaling, a_E[expert], tuple(b[expert] for b in b_E)))
    return found
