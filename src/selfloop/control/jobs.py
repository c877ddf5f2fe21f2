"""Answers that are computed while their caller polls: kept in memory, gone with the process."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from selfloop.control.operations import Pending
from selfloop.control.waiters import Waiters
from selfloop.types.errors import NotFound, NotReady, SelfloopError

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
    waiters: Waiters = field(default_factory=Waiters)
    task: "asyncio.Task[None] | None" = None
    answer: Answer | None = None
    ended_at: float = 0.0


class Jobs:
    """Work under a key that its client may repeat: a second submission finds the first.

    An answer is kept for minutes, and less long when many are large.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._ended: OrderedDict[str, _Job] = OrderedDict()
        self._kept_bytes = 0
        self._closing = False

    def submit(self, key: str, work: Callable[[], Coroutine[None, None, bytes]]) -> None:
        """Begin ``work`` unless its key is known. Raises :class:`NotReady` when too much is under way."""
        self._forget_old()
        if key in self._jobs:
            return
        if len(self._jobs) - len(self._ended) >= _MAX_JOBS:
            raise NotReady(f"{_MAX_JOBS} requests are under way; this one is welcome when some have ended", 1.0)
        job = self._jobs[key] = _Job()
        job.task = asyncio.create_task(self._carry_out(key, job, work()), name=f"job-{key}")

    async def wait(self, key: str, timeout_s: float) -> Answer | Pending:
        """The answer, as soon as there is one within ``timeout_s``. Raises :class:`NotFound` for an unknown key."""
        job = self._jobs.get(key)
        if job is None:
            raise NotFound("request", key)
        if job.answer is None and not self._closing:
            await job.waiters.wait(timeout_s)
        return Pending("sampling") if job.answer is None else job.answer

    def cancel(self, key: str) -> None:
        """End the work, if it is still under way; nobody hears of it again."""
        job = self._jobs.get(key)
        if job is not None and job.answer is None and job.task is not None:
            job.task.cancel()

    def release(self) -> None:
        """Send everyone who waits home; they ask again."""
        self._closing = True
        for job in self._jobs.values():
            job.waiters.release()

    async def stop(self) -> None:
        self.release()
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, key: str, job: _Job, work: Coroutine[None, None, bytes]) -> None:
        try:
            job.answer = Answer(await work)
        except SelfloopError as error:
            job.answer = Answer(b"", error)
        finally:
            if job.answer is None:
                del self._jobs[key]
            else:
                self._keep(key, job, job.answer)
            job.waiters.release()

    def _keep(self, key: str, job: _Job, answer: Answer) -> None:
        job.task = None
        job.ended_at = time.monotonic()
        self._ended[key] = job
        self._kept_bytes += len(answer.body)
        self._forget_old()

    def _forget_old(self) -> None:
        too_old = time.monotonic() - _KEPT_S
        while self._ended:
            key, job = next(iter(self._ended.items()))
            # The newest stays however large it is: it was not fetched yet.
            if job.ended_at >= too_old and (self._kept_bytes <= _KEPT_BYTES or len(self._ended) == 1):
                return
            assert job.answer is not None
            self._kept_bytes -= len(job.answer.body)
            del self._ended[key], self._jobs[key]
