"""What has ended, in order, for a client that reads on from where it was."""

from collections.abc import Callable
from typing import NamedTuple


class Completion(NamedTuple):
    """A key that has an answer of ``size`` bytes, or None: asking for it brings an error."""

    key: str
    size: int | None


class _Event(NamedTuple):
    cursor: int
    size: int | None
    at: float


class Completions:
    """Completions with rising cursors, each reported until the reader's cursor has passed it.

    Args:
        start: lies behind every cursor that was given out under this name before, so that one from then is seen to be.
    """

    def __init__(self, start: int) -> None:
        self._events: dict[str, _Event] = {}
        self._start = self.cursor = start

    def __len__(self) -> int:
        return len(self._events)

    def add(self, key: str, size: int | None, at: float) -> None:
        """``key`` has ended, at time ``at``."""
        self._events.pop(key, None)
        self.cursor += 1
        self._events[key] = _Event(self.cursor, size, at)

    def after(self, cursor: int) -> list[Completion]:
        """Everything behind ``cursor``; what is up to it goes. One that was never given out here counts as 0."""
        if self._start <= cursor <= self.cursor:
            self._drop_while(lambda event: event.cursor <= cursor)
        return [Completion(key, event.size) for key, event in self._events.items()]

    def forget_before(self, at: float) -> None:
        """Drop what ended before the time ``at``: nobody has asked."""
        self._drop_while(lambda event: event.at < at)

    def _drop_while(self, is_over: Callable[[_Event], bool]) -> None:
        while self._events:
            key, event = next(iter(self._events.items()))
            if not is_over(event):
                break
            del self._events[key]
