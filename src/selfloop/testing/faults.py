"""Deaths of workers at will: the launcher of servers that are made for tests.

It is the local launcher, which also notes the processes of its workers, and looks with each optimizer step that is sent
whether the worker is to die with it.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from selfloop.testing.orders import Orders, kill
from selfloop.types.operation import OptimStep, kind_of
from selfloop.worker.launchers.base import WorkerHandle, WorkerSpec
from selfloop.worker.launchers.local import LocalLauncher
from selfloop.worker.protocol import Call, Event, Execute


class Launcher:
    """See :class:`selfloop.worker.launchers.base.Launcher`."""

    def __init__(self, data_dir: Path) -> None:
        self._inner = LocalLauncher(data_dir)
        self._orders = Orders(data_dir)

    async def launch(self, spec: WorkerSpec, report: Callable[[str], None]) -> "MortalWorker":
        return MortalWorker(await self._inner.launch(spec, report), self._orders)

    def release(self, name: str) -> None:
        self._inner.release(name)


class MortalWorker:
    """A worker that dies by its orders; see :class:`selfloop.worker.launchers.base.WorkerHandle`."""

    def __init__(self, worker: WorkerHandle, orders: Orders) -> None:
        self._worker = worker
        self._orders = orders
        self.address, self.pid, self.ended = worker.address, worker.pid, worker.ended
        orders.note(self.pid)
        self.ended.add_done_callback(lambda _: orders.forget(self.pid))

    def send(self, call: Call, payload: bytes = b"") -> None:
        self._worker.send(call, payload)
        if isinstance(call.command, Execute) and _is_step(payload) and self._orders.is_last_step():
            assert self.pid is not None
            kill(self.pid)

    def events(self) -> AsyncIterator[tuple[Event, bytes]]:
        return self._worker.events()

    async def kill(self, cause: str) -> None:
        await self._worker.kill(cause)


class _Tag(msgspec.Struct):
    type: str


_tags = msgspec.msgpack.Decoder(_Tag)


def _is_step(payload: bytes) -> bool:
    """Whether these are an optimizer step's bytes; of other operations they may be many, and are not read whole."""
    return _tags.decode(payload).type == kind_of(OptimStep)
