"""How much one key may ask for: requests a second, bytes of bodies a second, requests open at a time.

Whoever asks too fast is slowed down first, before the request's body is read, and refused only when the wait would be
long: official clients then only run slower. Long polls are not counted as requests, as they carry no work.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from selfloop.types.errors import RateLimited
from selfloop.types.settings import KeyLimits

# Shorter than any client's patience with a request.
_MAX_WAIT_S = 8.0
# What may come at once after a pause, in seconds of the rate.
_BURST_S = 5.0
# A refused poll is repeated at once by some clients: so its answer is delayed.
_POLL_PAUSE_S = 2.0


class _Rate:
    """A token bucket that may be overdrawn: ``wait_s`` is for how long."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s = per_s
        self._level = self._burst = max(per_s * _BURST_S, 1.0)
        self._at = now

    def wait_s(self, now: float) -> float:
        """How long until there is room for one more."""
        self._level = min(self._burst, self._level + (now - self._at) * self._per_s)
        self._at = now
        return max(0.0, -self._level / self._per_s)

    def take(self, amount: float) -> None:
        self._level -= amount


@dataclass(slots=True)
class _Key:
    requests: _Rate | None
    body_bytes: _Rate | None
    num_open: int = 0


class Admission:
    """A request that was let in; it is notified of each part of the request's body, and of its end."""

    def __init__(self, key: _Key | None) -> None:
        self._key = key

    def received(self, num_bytes: int) -> None:
        if self._key is not None and self._key.body_bytes is not None:
            self._key.body_bytes.take(num_bytes)

    def end(self) -> None:
        if self._key is not None:
            self._key.num_open -= 1


class KeyLimiter:
    def __init__(self, limits: KeyLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._keys: dict[str, _Key] = {}

    async def admit(self, key_id: str, *, is_poll: bool) -> Admission:
        """Let a request in, perhaps after a wait; the caller ends it. Raises :class:`RateLimited`."""
        if self._limits == KeyLimits():
            return Admission(None)
        key = self._keys.get(key_id)
        if key is None:
            key = self._keys[key_id] = self._new_key()
        limit = self._limits.open_requests
        if limit and key.num_open >= limit:
            if is_poll:
                await asyncio.sleep(_POLL_PAUSE_S)
            raise RateLimited(f"this key has {limit} requests open, which is its limit", _POLL_PAUSE_S)
        key.num_open += 1
        admission = Admission(key)
        try:
            if not is_poll:
                await self._pace(key)
        except BaseException:
            admission.end()
            raise
        return admission

    async def _pace(self, key: _Key) -> None:
        now = self._clock()
        rates = [rate for rate in (key.requests, key.body_bytes) if rate is not None]
        wait_s = max((rate.wait_s(now) for rate in rates), default=0.0)
        if wait_s > _MAX_WAIT_S:
            raise RateLimited("this key asks for more than its limit of requests or bytes a second", math.ceil(wait_s))
        if key.requests is not None:
            key.requests.take(1)
        if wait_s:
            await asyncio.sleep(wait_s)

    def _new_key(self) -> _Key:
        limits, now = self._limits, self._clock()
        return _Key(
            _Rate(limits.requests_per_s, now) if limits.requests_per_s else None,
            _Rate(limits.body_bytes_per_s, now) if limits.body_bytes_per_s else None,
        )
