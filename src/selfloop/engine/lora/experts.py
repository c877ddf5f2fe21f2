"""Adapters on the experts of a mixture: each expert has an A and a B of its own, and sees the rows routed to it."""

from bisect import bisect_left
from collections.abc import Sequence

from selfloop.engine.lora.grouped_matmul import LoraSegment


class ExpertSegments:
    """The segments of a group that every expert has, dealt to the experts.

    Args:
        segments: over all rows of a batch, with ``a`` (E, n * R, in) and ``b`` (E, out, R).
    """

    def __init__(self, segments: list[LoraSegment]) -> None:
        # Unbound once: the gradient of all experts is then put together once.
        self._segments = [(s, s.a.unbind(), [b_EOR.unbind() for b_EOR in s.b]) for s in segments]

    def of(self, expert: int, rows: Sequence[int]) -> list[LoraSegment]:
        """Those of one expert, counting the ``rows`` that go to it, which ascend."""
        found: list[LoraSegment] = []
        for segment, a_E, b_E in self._segments:
            start, stop = bisect_left(rows, segment.start), bisect_left(rows, segment.stop)
            if start < stop:
                found.append(LoraSegment(start, stop, segment.scaling, a_E[expert], tuple(b[expert] for b in b_E)))
        return found
