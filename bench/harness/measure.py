"""Measuring in alternation, so that all sides see the same state of a machine that is never quiet.

Two clocks: ``wall``, and ``cpu``, this process's CPU time over its threads, which is the wall's on a quiet machine and
leaves neighbours out on a busy one.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

Clock = Literal["wall", "cpu"]
_clock: Clock = "wall"


def use_clock(clock: Clock) -> None:
    """Which clock :func:`now` reads from here on."""
    global _clock
    _clock = clock


@contextmanager
def wall_clock() -> Generator[None]:
    """The wall's within: what several processes do together has no CPU time of ours."""
    before = _clock
    use_clock("wall")
    try:
        yield
    finally:
        use_clock(before)


def now() -> float:
    """Seconds since some moment."""
    if _clock == "wall":
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = now()
    call()
    return now() - started


def alternate(calls: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Call each in turn, ``rounds`` times over; returns what each returned, round by round.

    Args:
        calls: by name; each measures its side once and returns the figure.
        warm_up: call each once beforehand and forget the figure.
    """
    assert rounds >= 1
    if warm_up:
        for call in calls.values():
            call()
    values: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            values[name].append(call())
    return values


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``ours`` divided by ``theirs``, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def scaled(values: Sequence[float], factor: float) -> list[float]:
    return [factor * value for value in values]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    assert values
    assert 0 < share <= 1
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]
