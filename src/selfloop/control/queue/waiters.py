"""Many callers that wait for one thing, cheaply: a future and a timer each, no task."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

Key = tuple[str, str]
"""Of something that was accepted: its owner (a run, a sampler) and its own id."""

_RECENT_MAX_BYTES = 64 * 1024


class Waiters:
    """Those who wait for something to happen; ``release`` sends all of them on."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self, timeout_s: float) -> None:
        """Return on ``release``, or after ``timeout_s``."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(timeout_s, _resolve, waiter)
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiting.discard(waiter)

    def release(self) -> None:
        for waiter in self._waiting:
            _resolve(waiter)


class Announcements:
    """Something that happens now and then. Whoever looks at a row for it misses none between two looks."""

    def __init__(self) -> None:
        self._waiters = Waiters()
        self.count = 0
        """How often it has happened; to be noted before a look."""

    def announce(self) -> None:
        self.count += 1
        self._waiters.release()

    async def wait(self, seen: int, timeout_s: float) -> None:
        """Return once it has happened more often than ``seen``, or after ``timeout_s``."""
        if self.count == seen:
            await self._waiters.wait(timeout_s)


class Topics:
    """Announcements by topic, of which only those are kept that somebody follows."""

    def __init__(self) -> None:
        self._followed: dict[str, list[Announcements]] = {}
        self.is_closing = False

    @contextmanager
    def followed(self, topic: str) -> Generator[Announcements]:
        announcements = Announcements()
        self._followed.setdefault(topic, []).append(announcements)
        try:
            yield announcements
        finally:
            self._followed[topic].remove(announcements)
            if not self._followed[topic]:
                del self._followed[topic]

    def announce(self, topic: str) -> None:
        for announcements in self._followed.get(topic, ()):
            announcements.announce()

    def close(self) -> None:
        """Wake everybody for the last time."""
        self.is_closing = True
        for topic in self._followed:
            self.announce(topic)


class _Awaited(Generic[T]):
    def __init__(self) -> None:
        self.waiters = Waiters()
        self.outcome: T | None = None

    def complete(self, outcome: T) -> None:
        self.outcome = outcome
        self.waiters.release()


class AwaitedOutcomes(Generic[T]):
    """What was accepted and has no outcome yet, with those who wait for it; and the newest outcomes.

    Args:
        num_bytes: the size of an outcome; large ones are not kept, as the database has them.
        num_recent: how many outcomes are kept. The poll that asks for one is mostly on its way.
    """

    def __init__(self, num_bytes: Callable[[T], int], num_recent: int) -> None:
        self._num_bytes = num_bytes
        self._num_recent = num_recent
        self._awaited: dict[Key, _Awaited[T]] = {}
        self._recent: OrderedDict[Key, T] = OrderedDict()
        self._closing = False

    def __contains__(self, key: Key) -> bool:
        """Whether it was accepted and has no outcome yet."""
        return key in self._awaited

    def expect(self, key: Key) -> None:
        """It was accepted: it has an outcome one day."""
        self._awaited.setdefault(key, _Awaited())

    def complete(self, key: Key, outcome: T) -> None:
        """The outcome is durable: everybody who waits for it has it now."""
        awaited = self._awaited.pop(key, None)
        if awaited is not None:
            awaited.complete(outcome)
        if self._num_bytes(outcome) <= _RECENT_MAX_BYTES:
            self._recent[key] = outcome
            if len(self._recent) > self._num_recent:
                self._recent.popitem(last=False)

    def recent(self, key: Key) -> T | None:
        """An outcome of late, if it was small."""
        return self._recent.get(key)

    async def wait(self, key: Key, timeout_s: float) -> T | None:
        """The outcome of what is awaited, None if there is none within ``timeout_s``."""
        awaited = self._awaited[key]
        if not self._closing:
            await awaited.waiters.wait(timeout_s)
        return awaited.outcome

    def send_home(self) -> None:
        """End the long polls, also those that come from now on; their clients ask again."""
        self._closing = True
        for awaited in self._awaited.values():
            awaited.waiters.release()


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
