"""A sampling request that comes again under its key gets the answer of the first: none is sampled twice."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from selfloop.types.errors import Conflict

_KEPT_S = 600.0
# How long sampling goes on when the connection of whoever waits for it broke: its client asks again within seconds.
_LEAVE_S = 15.0
_KEPT_COUNT = 4096
_KEPT_BYTES = 64 * 1024 * 1024

Key = tuple[str, str]
"""The sampler's id and the request's key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A rendered answer, and the policy version it was sampled from."""

    content: bytes
    policy_version: int


@dataclass(slots=True)
class _Entry:
    fingerprint: str
    task: "asyncio.Task[Answer]"
    num_waiting: int = 0
    finished_at: float = 0.0


class SampleIdempotency:
    """Answers by key, in memory: those being sampled, and those that were given out within the last ten minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, leave_s: float = _LEAVE_S) -> None:
        self._clock = clock
        self._leave_s = leave_s
        self._running: dict[Key, _Entry] = {}
        self._finished: dict[Key, _Entry] = {}
        self._finished_bytes = 0

    async def answer(
        self, sampler_id: str, key: str, fingerprint: str, make: Callable[[], Awaitable[Answer]]
    ) -> Answer:
        """What ``make`` gives, or gave to the same request before; joins it while it is under way.

        An error is given to all who wait for it and not kept. With nobody left who waits, ``make`` is
        cancelled after a while.

        Raises:
            Conflict: the key was used for a different request.
        """
        self._forget_old()
        place = (sampler_id, key)
        entry = self._running.get(place) or self._finished.get(place)
        if entry is None:
            entry = self._running[place] = _Entry(fingerprint, asyncio.ensure_future(_run(make)))
            entry.task.add_done_callback(lambda _: self._finish(place))
        elif entry.fingerprint != fingerprint:
            raise Conflict(f"Idempotency-Key {key} was already used for a different request")
        entry.num_waiting += 1
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.num_waiting -= 1
            if not entry.num_waiting and not entry.task.done():
                asyncio.get_running_loop().call_later(self._leave_s, _cancel_unless_wanted, entry)

    def _finish(self, place: Key) -> None:
        entry = self._running.pop(place)
        if entry.task.cancelled() or entry.task.exception() is not None:
            return
        entry.finished_at = self._clock()
        self._finished[place] = entry
        self._finished_bytes += len(entry.task.result().content)
        self._forget_old()

    def _forget_old(self) -> None:
        now = self._clock()
        while self._finished:
            place, oldest = next(iter(self._finished.items()))
            within = len(self._finished) <= _KEPT_COUNT and self._finished_bytes <= _KEPT_BYTES
            if within and now - oldest.finished_at < _KEPT_S:
                return
            del self._finished[place]
            self._finished_bytes -= len(oldest.task.result().content)


def _cancel_unless_wanted(entry: _Entry) -> None:
    if not entry.num_waiting:
        entry.task.cancel()


async def _run(make: Callable[[], Awaitable[Answer]]) -> Answer:
    return await make()
