"""The curves of a run: what its operations measured, in parts, by few points, or as it comes."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Collection
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection

from selfloop.control.context import Context
from selfloop.control.observe.downsample import largest_triangles
from selfloop.control.observe.measurements import values_of
from selfloop.control.resources.access import Caller
from selfloop.control.resources.runs import Runs
from selfloop.storage.db import queries_metrics
from selfloop.types.status import RunStatus

# What is answered at a time to who follows from the beginning.
_BATCH = 500
# How long a stream says nothing before it is looked whether the run still lives.
QUIET_S = 15.0


class Series(msgspec.Struct):
    """One quantity over the operations that measured it; the lists are of one length.

    Args:
        numbers: of the measurements among those of the run, ascending.
        steps: optimizer steps that they belong to.
        times: their ends in UNIX seconds.
        values: null where one is not finite.
    """

    name: str
    numbers: list[int] = []
    steps: list[int] = []
    times: list[float] = []
    values: list[float | None] = []


class Curves(NamedTuple):
    """Series by name; ``next_after`` is the number to go on after, None where there is no more yet."""

    series: list[Series]
    last: int
    next_after: int | None


class Point(msgspec.Struct):
    """What one operation measured; ``values`` by name, null where one is not finite."""

    number: int
    kind: str
    step: int
    at: float
    values: dict[str, float | None]


class Fresh(NamedTuple):
    """What came, oldest first; ``is_last`` when the run has ended, and nothing comes any more."""

    points: list[Point]
    is_last: bool


class RunMetrics:
    def __init__(self, context: Context, runs: Runs) -> None:
        self._c = context
        self._runs = runs

    def stop(self) -> None:
        """End the streams; their clients come again."""
        self._c.outcomes.measured.close()

    async def curves(
        self,
        caller: Caller,
        run_id: str,
        *,
        names: Collection[str] | None = None,
        after: int = 0,
        limit: int | None = None,
        num_points: int | None = None,
    ) -> Curves:
        """The series of ``names`` (None: of all) over the ``limit`` measurements behind ``after``.

        With ``num_points`` each has at most so many points. Raises :class:`NotFound`.
        """
        await self._runs.get(caller, run_id)

        def work(connection: Connection) -> Curves:
            found, last = _gathered(connection, run_id, names, after, limit)
            is_more = limit is not None and any(queries_metrics.after(connection, run_id, last, 1))
            kept = found if num_points is None else [_thinned(series, num_points) for series in found]
            return Curves(kept, last, last if is_more else None)

        return await asyncio.to_thread(self._c.db.reading, work)

    async def follow(self, caller: Caller, run_id: str, after: int, timeout_s: float) -> AsyncGenerator[Fresh]:
        """What is measured behind ``after``, as it comes, until the run has ended or for ``timeout_s``.

        No points in quiet times.
        """
        deadline = time.monotonic() + timeout_s
        measured = self._c.outcomes.measured
        with measured.followed(run_id) as announced:
            while True:
                seen, left_s = announced.count, deadline - time.monotonic()
                # Looked at first: what came before its end is then among the points.
                has_ended = (await self._runs.get(caller, run_id)).run.status != RunStatus.ACTIVE
                points = await self._behind(run_id, after)
                is_whole = len(points) < _BATCH
                yield Fresh(points, has_ended and is_whole)
                after = points[-1].number if points else after
                if is_whole:
                    if has_ended or left_s <= 0 or measured.is_closing:
                        return
                    await announced.wait(seen, min(QUIET_S, left_s))

    async def _behind(self, run_id: str, after: int) -> list[Point]:
        def work(connection: Connection) -> list[Point]:
            rows = queries_metrics.after(connection, run_id, after, _BATCH)
            return [Point(number, m.kind, m.step, m.at, _finite(values_of(m))) for number, m in rows]

        return await asyncio.to_thread(self._c.db.reading, work)


def _gathered(
    connection: Connection, run_id: str, names: Collection[str] | None, after: int, limit: int | None
) -> tuple[list[Series], int]:
    """The series, in the order of their names, and the number of the last measurement."""
    found: dict[str, Series] = {}
    last = after
    for last, measured in queries_metrics.after(connection, run_id, after, limit):
        for name, value in values_of(measured).items():
            if names is None or name in names:
                series = found.setdefault(name, Series(name))
                series.numbers.append(last)
                series.steps.append(measured.step)
                series.times.append(measured.at)
                series.values.append(value if math.isfinite(value) else None)
    return [found[name] for name in sorted(found)], last


def _thinned(series: Series, num_points: int) -> Series:
    """The points that are finite, by few of them."""
    places = [place for place, value in enumerate(series.values) if value is not None]
    ys = [value for value in series.values if value is not None]
    kept = [places[place] for place in largest_triangles([float(series.numbers[p]) for p in places], ys, num_points)]
    return Series(
        series.name,
        [series.numbers[place] for place in kept],
        [series.steps[place] for place in kept],
        [series.times[place] for place in kept],
        [series.values[place] for place in kept],
    )


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
