"""A bound on Python code that is driven by what a caller sent."""

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class CpuLimitReached(Exception):
    """The code ran longer than it may."""


@contextmanager
def cpu_limit(seconds: float) -> Generator[None]:
    """Raise :class:`CpuLimitReached` in the main thread once it has computed for ``seconds``."""
    started = time.thread_time()

    def stop(signum: int, frame: FrameType | None) -> None:
        # The timer counts what other threads compute, too.
        left = seconds - (time.thread_time() - started)
        if left <= 0:
            raise CpuLimitReached
        signal.setitimer(signal.ITIMER_VIRTUAL, left)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
