"""One sync to disk for everything that is written at the same moment."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from selfloop.types.errors import SelfloopError, Unavailable

# How long the next transaction gathers work after one that was shared: one costs the CPU as much as several writes.
_GATHER_S = 0.005

Work = Callable[[Connection], Any]
InTransaction = Callable[[Callable[[Connection], "list[_Ended]"]], "list[_Ended]"]


class _Waiting(NamedTuple):
    work: Work
    done: "asyncio.Future[Any]"


class _Ended(NamedTuple):
    """How one piece of work ended: with ``value``, or with ``error``."""

    value: Any
    error: BaseException | None


class GroupCommit:
    """Collects small writes while a transaction is being synced; the next transaction takes all of them.

    A sync costs milliseconds however much it carries, so a busy moment pays for one instead of hundreds.
    """

    def __init__(self, in_transaction: InTransaction, write_lock: asyncio.Lock) -> None:
        """``in_transaction`` does work in a transaction of the calling thread, and commits it."""
        self._in_transaction = in_transaction
        self._write_lock = write_lock
        self._waiting: list[_Waiting] = []
        self._flusher: asyncio.Task[None] | None = None

    async def run(self, work: Work) -> Any:
        """Do ``work`` in a transaction shared with others; returns its value once that is on disk.

        What ``work`` raises undoes its own changes only; it may be called twice, the first time undone.
        A caller that is cancelled meanwhile stops nothing.
        """
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(work, done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name="group-commit")
        return await done

    async def close(self) -> None:
        """Return once everything that was handed over is on disk."""
        if self._flusher is not None:
            await asyncio.gather(self._flusher, return_exceptions=True)

    async def _flush(self) -> None:
        while self._waiting:
            async with self._write_lock:
                batch, self._waiting = self._waiting, []
                committing = asyncio.to_thread(self._commit, [w.work for w in batch])
                (ended,) = await asyncio.gather(committing, return_exceptions=True)
            if isinstance(ended, BaseException):
                # The commit itself failed (a full disk, a locked file): nobody's work is stored.
                ended = [_Ended(None, ended)] * len(batch)
            for (_, done), (value, error) in zip(batch, ended, strict=True):
                if done.done():
                    continue
                if error is None:
                    done.set_result(value)
                else:
                    done.set_exception(error)
            if len(batch) > 1:
                await asyncio.sleep(_GATHER_S)

    def _commit(self, batch: Sequence[Work]) -> list[_Ended]:
        try:
            return self._in_transaction(lambda connection: [_Ended(work(connection), None) for work in batch])
        except Unavailable:
            raise
        except (SQLAlchemyError, SelfloopError):
            # One of them failed, which is rare: all once more, each behind a savepoint, to find which.
            return self._in_transaction(lambda connection: [self._try(connection, work) for work in batch])

    @staticmethod
    def _try(connection: Connection, work: Work) -> _Ended:
        try:
            with connection.begin_nested():
                return _Ended(work(connection), None)
        except (SQLAlchemyError, SelfloopError) as error:
            # Handed to the one who asked; the others' work goes on.
            return _Ended(None, error)
