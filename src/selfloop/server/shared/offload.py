"""Keep the work on large bodies off the event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

# Below this, the work is quicker than a thread's start.
_INLINE_BYTES = 256 * 1024

T = TypeVar("T")


async def off_loop(size_bytes: int, work: Callable[[], T]) -> T:
    """Do ``work`` on ``size_bytes`` of data, in a thread when it would hold other requests up."""
    return work() if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)
