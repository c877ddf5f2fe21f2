"""Whose turn it is, by device time used: start-time fair queueing.

Goyal, Vin, Cheng 1996, https://doi.org/10.1145/248156.248171. Each member has a clock that advances by the time it
used, divided by its weight; the one that is furthest behind goes next. Who comes with nothing to make up starts level
with the furthest behind: idle time is not saved. Who leaves ahead of the others comes back ahead of them.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)


class FairShare(Generic[_Key]):
    """Members that have work, each with a weight; times in seconds."""

    def __init__(self) -> None:
        self._clocks: dict[_Key, float] = {}
        self._weights: dict[_Key, float] = {}
        self._left_at: dict[_Key, float] = {}
        self._now = 0.0

    def __contains__(self, key: _Key) -> bool:
        return key in self._clocks

    def join(self, key: _Key, weight: float = 1.0) -> None:
        """It has work from here on; nothing changes if it already had."""
        assert weight > 0
        if key not in self._clocks:
            self._clocks[key] = max(self._left_at.pop(key, 0.0), self._now)
            self._weights[key] = weight

    def leave(self, key: _Key) -> None:
        """It has no work left."""
        clock = self._clocks.pop(key, None)
        if clock is not None:
            del self._weights[key]
            self._left_at[key] = clock

    def in_turn(self) -> list[_Key]:
        """All that have work, the furthest behind first; of equals the one that came first."""
        return sorted(self._clocks, key=lambda key: self._clocks[key])

    def charge(self, key: _Key, seconds: float) -> None:
        """It used the device; so did time go on for those who come later."""
        self._now = max(self._now, min(self._clocks.values()))
        self._clocks[key] += seconds / self._weights[key]
        # Those who would come back level with the others need no remembering.
        self._left_at = {other: at for other, at in self._left_at.items() if at > self._now}
