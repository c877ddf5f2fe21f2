"""A trainer deployment's metrics: requests and the machine's use, gathered by the minute and kept for a day.

Response times go into buckets whose bounds grow by a factor of 2^(1/4); a percentile is the geometric middle of
its bucket, so it is within 10% of the true one (from 1 ms up; below that it reads 1 ms).
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

MINUTE_S = 60
_PER_OCTAVE = 4
_MAX_BUCKET = 100


class Gpu(msgspec.Struct, array_like=True):
    """Sums over ``num`` looks at one GPU: bytes used, and the fraction of time that it worked."""

    num: int = 0
    memory_bytes: float = 0.0
    utilization: float = 0.0


class Usage(msgspec.Struct, frozen=True):
    """One look at the machine: the worker's cores and resident bytes, the data directory's disk, GPUs by index."""

    cpu_cores: float
    memory_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    gpus: dict[int, tuple[int, float]] = {}


class Minute(msgspec.Struct, array_like=True):
    """Sums of a minute (or of several, added up).

    Args:
        statuses: requests that ended, by the class of their status (2, 4, 5).
        times: how many response times fell into each bucket.
        request_s: sum over requests in progress of the time they were; over ``observed_s`` that is concurrency.
        num_looks: looks at the machine while the worker was up, over which the next fields are summed.
        publish_gap: the largest difference between trainer and sampler after a publish, in nats; None without one.
    """

    statuses: dict[int, int] = {}
    times: dict[int, int] = {}
    request_s: float = 0.0
    observed_s: float = 0.0
    num_looks: int = 0
    cpu_cores: float = 0.0
    memory_bytes: float = 0.0
    disk_used_bytes: float = 0.0
    disk_total_bytes: float = 0.0
    gpus: dict[int, Gpu] = {}
    publish_gap: float | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.statuses or self.num_looks or self.request_s) and self.publish_gap is None

    def note_gap(self, gap: float) -> None:
        self.publish_gap = gap if self.publish_gap is None else max(self.publish_gap, gap)

    def look(self, usage: Usage) -> None:
        self.num_looks += 1
        self.cpu_cores += usage.cpu_cores
        self.memory_bytes += usage.memory_bytes
        self.disk_used_bytes += usage.disk_used_bytes
        self.disk_total_bytes += usage.disk_total_bytes
        for index, (memory_bytes, utilization) in usage.gpus.items():
            gpu = self.gpus.setdefault(index, Gpu())
            gpu.num += 1
            gpu.memory_bytes += memory_bytes
            gpu.utilization += utilization

    def add(self, other: "Minute") -> None:
        if other.publish_gap is not None:
            self.note_gap(other.publish_gap)
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count
        for bucket, count in other.times.items():
            self.times[bucket] = self.times.get(bucket, 0) + count
        for name in ("request_s", "observed_s", "num_looks", "cpu_cores", "memory_bytes",
                     "disk_used_bytes", "disk_total_bytes"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for index, gpu in other.gpus.items():
            mine = self.gpus.setdefault(index, Gpu())
            mine.num += gpu.num
            mine.memory_bytes += gpu.memory_bytes
            mine.utilization += gpu.utilization

    def percentile_ms(self, fraction: float) -> float | None:
        """The response time that ``fraction`` of the requests stayed within; None without requests."""
        total = sum(self.times.values())
        if not total:
            return None
        rank, seen = math.ceil(fraction * total), 0
        for bucket in sorted(self.times):
            seen += self.times[bucket]
            if seen >= rank:
                return middle_ms(bucket)
        raise AssertionError(self.times)


def bucket_of(seconds: float) -> int:
    """The bucket of a response time: 0 up to 1 ms, then four to each doubling."""
    return 0 if seconds <= 0.001 else min(math.ceil(math.log2(seconds * 1000) * _PER_OCTAVE), _MAX_BUCKET)


def middle_ms(bucket: int) -> float:
    return 1.0 if bucket == 0 else 2 ** ((bucket - 0.5) / _PER_OCTAVE)


class _Live:
    """The minute that a deployment is in. ``active`` requests are in progress."""

    def __init__(self, now: float) -> None:
        self.active = 0
        self.seen_at = now
        self.start = int(now) // MINUTE_S * MINUTE_S
        self.minute = Minute()


class Meter:
    """The present minute of each deployment; minutes that are over wait to be stored."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._closed: list[tuple[str, int, Minute]] = []

    def begin(self, deployment_id: str) -> None:
        """A request is in progress from now on."""
        self._at(deployment_id).active += 1

    def end(self, deployment_id: str, status: int | None, seconds: float) -> None:
        """A request ended with a status (None: it is not to be counted) after ``seconds``."""
        live = self._at(deployment_id)
        live.active = max(live.active - 1, 0)
        if status is not None:
            self._count(live.minute, status, seconds)

    def count(self, deployment_id: str, status: int, seconds: float) -> None:
        """A request that was answered at once."""
        self._count(self._at(deployment_id).minute, status, seconds)

    def look(self, deployment_id: str, usage: Usage) -> None:
        self._at(deployment_id).minute.look(usage)

    def note_gap(self, deployment_id: str, gap: float) -> None:
        """Trainer and sampler were compared after a publish."""
        self._at(deployment_id).minute.note_gap(gap)

    def take_closed(self) -> list[tuple[str, int, Minute]]:
        """The minutes that are over, with their deployments; what nobody uses any more is forgotten."""
        for id in list(self._live):
            live = self._at(id)
            if live.minute.is_empty and not live.active:
                del self._live[id]
        closed, self._closed = self._closed, []
        return closed

    def put_back(self, closed: Iterable[tuple[str, int, Minute]]) -> None:
        self._closed[:0] = closed

    def take_all(self) -> list[tuple[str, int, Minute]]:
        """Also the minutes that are not over; for the end of the process."""
        return self.take_closed() + [
            (id, live.start, live.minute) for id, live in self._live.items() if not live.minute.is_empty
        ]

    def unstored(self, deployment_id: str) -> list[tuple[int, Minute]]:
        """Minutes of a deployment that are not stored yet."""
        if deployment_id in self._live:
            self._at(deployment_id)
        found = [(start, minute) for id, start, minute in self._closed if id == deployment_id]
        live = self._live.get(deployment_id)
        return found + ([(live.start, live.minute)] if live and not live.minute.is_empty else [])

    def _at(self, deployment_id: str) -> _Live:
        """The deployment's state, brought up to now; minutes that are over are closed on the way."""
        now = self._clock()
        live = self._live.get(deployment_id)
        if live is None:
            live = self._live[deployment_id] = _Live(now)
            return live
        while now >= live.start + MINUTE_S:
            end = live.start + MINUTE_S
            self._advance(live, end)
            if not live.minute.is_empty:
                self._closed.append((deployment_id, live.start, live.minute))
            live.minute, live.start = Minute(), end
            if not live.active:
                live.start = int(now) // MINUTE_S * MINUTE_S
                live.seen_at = now
        self._advance(live, now)
        return live

    def _advance(self, live: _Live, now: float) -> None:
        elapsed = max(now - live.seen_at, 0.0)
        live.minute.request_s += live.active * elapsed
        live.minute.observed_s += elapsed
        live.seen_at = max(now, live.seen_at)

    def _count(self, minute: Minute, status: int, seconds: float) -> None:
        kind, bucket = status // 100, bucket_of(seconds)
        minute.statuses[kind] = minute.statuses.get(kind, 0) + 1
        minute.times[bucket] = minute.times.get(bucket, 0) + 1


class Step(msgspec.Struct, frozen=True):
    """Minutes added up: from ``start`` (UNIX seconds) for ``seconds``, less where the step is not over."""

    start: int
    seconds: float
    sums: Minute


def steps(minutes: Sequence[tuple[int, Minute]], step_s: int, now: float) -> list[Step]:
    """Add minutes up to steps of ``step_s`` seconds; a step in which nothing was seen is left out."""
    sums: dict[int, Minute] = {}
    for start, minute in minutes:
        sums.setdefault(start // step_s * step_s, Minute()).add(minute)
    return [Step(start, max(min(step_s, now - start), 1.0), total) for start, total in sorted(sums.items())]


encode = msgspec.msgpack.encode
decoder: "msgspec.msgpack.Decoder[Minute]" = msgspec.msgpack.Decoder(Minute)
