"""Many callers that wait for one thing, cheaply: a future and a timer each, no task."""

import asyncio


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


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
