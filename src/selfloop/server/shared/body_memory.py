"""What the bodies of all requests together may take of memory, from the first byte to the request's end.

By then an operation is in the journal, on disk. A body takes many times its bytes while it is decoded and checked: so
each is charged with that from the start, and whoever finds no room waits for it, and is asked to come again later.
"""

import asyncio
import contextlib
import ctypes
import sys
from collections import deque

import psutil

from selfloop.types.errors import NotReady

MEMORY_PER_BYTE = 8
"""Measured: 6.6 bytes at the height for each byte of JSON with token ids."""
_SHARE, _AT_LEAST_BYTES = 0.125, 512 * 2**20
# Charged in steps of this where the length is not said.
_STEP_BYTES = 256 * 1024
_MAX_WAIT_S = 5.0
_RETRY_S = 2.0
# Freed memory is kept by the allocator for the next body; beyond this it goes back to the system.
_TRIM_AFTER_BYTES = 256 * 2**20
_TRIM_DELAY_S = 3.0


def default_body_memory() -> int:
    """An eighth of this machine's memory, in bytes."""
    return max(_AT_LEAST_BYTES, int(psutil.virtual_memory().total * _SHARE))


class BodyMemory:
    """A budget in bytes. First come, first served; a body larger than all of it may have all of it."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._used = 0
        self._freed = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._trimming: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        return self._used

    async def take(self, num_bytes: int) -> int:
        """Charge ``num_bytes``, at once or when there is room; returns what was charged.

        Raises:
            NotReady: there was no room for a while.
        """
        num_bytes = min(num_bytes, self._total)
        if not self._waiting and self._used + num_bytes <= self._total:
            self._used += num_bytes
            return num_bytes
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = num_bytes, room
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                await room
        except BaseException as error:
            if room.done() and not room.cancelled():
                self.give_back(num_bytes)  # It came as we gave up.
            else:
                # Whoever gave room back in the same turn of the loop has passed it over, and taken it off.
                with contextlib.suppress(ValueError):
                    self._waiting.remove(entry)
                self._let_in()
            if isinstance(error, TimeoutError):
                raise NotReady(
                    f"the bodies of requests under way take the {self._total // 2**20} MiB that they may "
                    "(--body-memory): send this one again",
                    _RETRY_S,
                ) from None
            raise
        return num_bytes

    def give_back(self, num_bytes: int) -> None:
        self._used -= num_bytes
        self._freed += num_bytes
        self._let_in()
        is_idle = self._used < self._total // 8
        if self._freed >= _TRIM_AFTER_BYTES and is_idle and (self._trimming is None or self._trimming.done()):
            self._trimming = asyncio.create_task(self._trim_soon(), name="give-memory-back")

    async def _trim_soon(self) -> None:
        """A little later, for the last of a crowd of bodies, and what their requests leave, too."""
        await asyncio.sleep(_TRIM_DELAY_S)
        self._freed = 0
        await asyncio.to_thread(_trim)

    def _let_in(self) -> None:
        while self._waiting and self._used + self._waiting[0][0] <= self._total:
            num_bytes, room = self._waiting.popleft()
            if not room.done():
                self._used += num_bytes
                room.set_result(None)


class Lease:
    """One request's part of the budget; grows as its body comes."""

    def __init__(self, memory: BodyMemory, declared: int | None) -> None:
        self._memory = memory
        self._declared = declared
        self._charged_for = 0
        self._charged = 0

    async def cover(self, num_bytes: int) -> None:
        """Be charged for a body of ``num_bytes`` at least. Raises :class:`NotReady`."""
        if num_bytes <= self._charged_for:
            return
        expected = self._charged_for + _STEP_BYTES if self._declared is None else self._declared
        step = max(expected, num_bytes) - self._charged_for
        self._charged += await self._memory.take(step * MEMORY_PER_BYTE)
        self._charged_for += step

    def end(self) -> None:
        charged, self._charged = self._charged, 0
        if charged:
            self._memory.give_back(charged)


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
