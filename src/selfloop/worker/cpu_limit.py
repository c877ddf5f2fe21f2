"""A bound on Python code that is driven by what a caller sent."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class CpuLimitReached(Exception):
    """The code ran longer than it may."""


@contextmanager
def cpu_limit(seconds: float) -> Generator[None]:
    """Raise :class:`CpuLimitReached` in the main thread once the process has computed for ``seconds``."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise CpuLimitReached

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
