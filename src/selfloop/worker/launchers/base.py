"""What control knows of where workers run: a launcher makes workers of a description, and a handle reaches one.

``tests/contract/test_launchers.py`` says what each launcher must keep; ``registry`` finds one by name.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfloop.types.blob_ref import BlobRef
from selfloop.types.settings import WorkerSettings
from selfloop.worker.protocol import Call, Event


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker to be launched.

    Args:
        name: the base model's; a launcher has one worker of a name at a time.
        model: a prepared model folder.
        owner: distinguishes the data directory that it is for from a copy of it: which one it is, and where it lies.
    """

    name: str
    model: BlobRef
    owner: str = ""
    settings: WorkerSettings = WorkerSettings()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a worker ended.

    Args:
        begun: tickets of the operations that it had begun and not answered, as far as that is known.
        by_kernel: the system ended it for want of memory.
    """

    reason: str
    begun: frozenset[int] = frozenset()
    by_kernel: bool = False


class WorkerHandle(Protocol):
    """One worker, from its launch to its end. A worker that is silent, or at one thing, for longer than its settings
    allow is ended by whoever made the handle.
    """

    address: str
    """Which worker it is, for people and logs."""
    pid: int | None
    """Its process, where that is one of this machine."""
    ended: "asyncio.Future[WorkerEnd]"
    """Done once, behind the last event."""

    def send(self, call: Call, payload: bytes = b"") -> None:
        """Send a call; calls arrive in the order they were sent. What is sent to one that has ended is dropped."""
        ...

    def events(self) -> AsyncIterator[tuple[Event, bytes]]:
        """What the worker sends, with the second frame of each, in order and to its end. To be read once."""
        ...

    async def kill(self, cause: str) -> None:
        """End the worker now, if it has not ended, and let go of what the handle holds. Again is fine."""
        ...


class Launcher(Protocol):
    """Starts workers. Made once, with the path of the server's data directory, the root ``data`` of references."""

    async def launch(self, spec: WorkerSpec, report: Callable[[str], None]) -> WorkerHandle:
        """Start a worker; returns once there is one, which may be before it has its model.

        Args:
            report: hears what is being done.

        Raises:
            OperationFailed: the model cannot be loaded, with the cause.
            WorkerLost: what was started has ended.
        """
        ...

    def release(self, name: str) -> None:
        """Give back at once what is kept in memory for workers of that name; a worker that there is ends."""
        ...


def worker_log_path(data_dir: Path, name: str) -> Path:
    """Where the output of a base model's worker goes, if it runs on this machine."""
    return data_dir / "logs" / f"worker-{name.replace('/', '--')}.log"
