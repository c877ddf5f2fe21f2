"""Answers that are computed while their caller polls: kept in memory, gone with the process."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from selfloop.control.queue.operations import Pending
from selfloop.control.queue.waiters import Waiters
from selfloop.control.sampling.completions import Completion, Completions
from selfloop.control.sampling.open_futures import OpenJobs
from selfloop.types.errors import NotFound, NotReady, SelfloopError

log = logging.getLogger(__name__)

_KEPT_S = 600.0
_KEPT_BYTES = 48 * 1024 * 1024
_MAX_JOBS = 20_000


@dataclass(frozen=True, slots=True)
class Answer:
    """How a job ended: its bytes, or the error."""

    body: bytes
    error: SelfloopError | None = None


@dataclass(slots=True, eq=False)
class _Job:
    channel: str
    waiters: Waiters | None = None
    task: "asyncio.Task[bytes] | None" = None
    answer: Answer | None = None
    ended_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Channel:
    """What ended for one reader, who asks for all of it at once."""

    completions: Completions
    waiters: Waiters = field(default_factory=Waiters)
    num_running: int = 0
    num_reading: int = 0


class Jobs:
    """Work under a key that its client may repeat: a second submission finds the first.

    An answer is kept for minutes, and less long when many are large or its client has said that it has it.

    Args:
        path: of the file that names the open jobs for the gateway after this one.
    """

    def __init__(self, path: Path) -> None:
        self._jobs: dict[str, _Job] = {}
        self._ended: OrderedDict[str, _Job] = OrderedDict()
        self._channels: dict[str, _Channel] = {}
        self._kept_bytes = 0
        self._closing = False
        self._open = OpenJobs(path)
        for name in self._open.lost:
            channel, _, key = name.rpartition("|")
            self._channel(channel).completions.add(key, None, time.monotonic())

    def submit(self, channel: str, key: str, work: Callable[[], Coroutine[None, None, bytes]]) -> None:
        """Begin ``work`` unless its key is known. Raises :class:`NotReady` when too much is under way.

        Args:
            channel: of the reader who hears of the end by :meth:`completions`.
        """
        self._forget_old()
        if key in self._jobs:
            return
        if len(self._jobs) - len(self._ended) >= _MAX_JOBS:
            raise NotReady(f"{_MAX_JOBS} requests are under way; this one is welcome when some have ended", 1.0)
        job = self._jobs[key] = _Job(channel)
        self._channel(channel).num_running += 1
        self._open.add(f"{channel}|{key}")
        job.task = asyncio.create_task(work(), name=f"job-{key}")
        job.task.add_done_callback(lambda task: self._ended_with(key, job, task))

    async def wait(self, key: str, timeout_s: float) -> Answer | Pending:
        """The answer, as soon as there is one within ``timeout_s``. Raises :class:`NotFound` for an unknown key."""
        job = self._jobs.get(key)
        if job is None:
            raise NotFound("request", key)
        if job.answer is None and not self._closing:
            job.waiters = job.waiters or Waiters()
            await job.waiters.wait(timeout_s)
        return Pending("sampling") if job.answer is None else job.answer

    async def completions(self, channel: str, cursor: int, timeout_s: float) -> tuple[list[Completion], int]:
        """What ended in a channel behind ``cursor``, as soon as there is any within ``timeout_s``; and the next cursor.

        What was lost with an earlier gateway is reported as failed.
        """
        self._forget_old()
        known = self._channel(channel)
        known.num_reading += 1
        try:
            found = known.completions.after(cursor)
            if not found and timeout_s > 0 and not self._closing:
                await known.waiters.wait(timeout_s)
                found = known.completions.after(cursor)
            return found, known.completions.cursor
        finally:
            known.num_reading -= 1

    def retrieved(self, channel: str, keys: Iterable[str]) -> None:
        """The channel's client has these answers: they need not be kept."""
        mine = [key for key in keys if (job := self._ended.get(key)) is not None and job.channel == channel]
        for key in mine:
            self._drop(key)

    def cancel(self, key: str) -> None:
        """End the work, if it is still under way; nobody hears of it again."""
        job = self._jobs.get(key)
        if job is not None and job.answer is None and job.task is not None:
            job.task.cancel()

    def cancel_channels(self, is_ended: Callable[[str], bool]) -> None:
        """End what is under way in the channels that ``is_ended`` names, and forget what ended."""
        for key, job in list(self._jobs.items()):
            if is_ended(job.channel):
                if job.answer is None:
                    self.cancel(key)
                else:
                    self._drop(key)
        for name in [name for name in self._channels if is_ended(name)]:
            self._channels[name].completions.forget_before(float("inf"))

    def release(self) -> None:
        """Send everyone who waits home; they ask again."""
        self._closing = True
        for job in self._jobs.values():
            if job.waiters is not None:
                job.waiters.release()
        for channel in self._channels.values():
            channel.waiters.release()

    async def stop(self) -> None:
        self.release()
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._open.close()

    def _channel(self, name: str) -> _Channel:
        channel = self._channels.get(name)
        if channel is None:
            # Microseconds: more than jobs can have ended since an earlier channel of this name began to count.
            channel = self._channels[name] = _Channel(Completions(time.time_ns() // 1000))
        return channel

    def _ended_with(self, key: str, job: _Job, task: "asyncio.Task[bytes]") -> None:
        job.task = None
        channel = self._channel(job.channel)
        channel.num_running -= 1
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or not isinstance(error, SelfloopError | None):
            if error is not None:
                log.error("%s failed", key, exc_info=error)
            del self._jobs[key]
            if not self._closing:
                self._open.remove([f"{job.channel}|{key}"])
        else:
            job.answer = Answer(task.result()) if error is None else Answer(b"", error)
            job.ended_at = time.monotonic()
            self._ended[key] = job
            self._kept_bytes += len(job.answer.body)
            channel.completions.add(key, len(job.answer.body) if error is None else None, job.ended_at)
            channel.waiters.release()
            self._forget_old()
        if job.waiters is not None:
            job.waiters.release()

    def _drop(self, key: str) -> None:
        job = self._ended.pop(key)
        assert job.answer is not None
        self._kept_bytes -= len(job.answer.body)
        del self._jobs[key]
        self._open.remove([f"{job.channel}|{key}"])

    def _forget_old(self) -> None:
        too_old = time.monotonic() - _KEPT_S
        while self._ended:
            key, job = next(iter(self._ended.items()))
            # The newest stays however large it is: it was not fetched yet.
            if job.ended_at >= too_old and (self._kept_bytes <= _KEPT_BYTES or len(self._ended) == 1):
                break
            self._drop(key)
        for name, channel in list(self._channels.items()):
            channel.completions.forget_before(too_old)
            if not (len(channel.completions) or channel.num_running or channel.num_reading):
                del self._channels[name]
