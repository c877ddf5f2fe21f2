"""Workers without a process: the protocol's own messages over a channel in memory, answered by a script."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from selfloop.types.errors import OperationFailed
from selfloop.worker.launchers.base import WorkerEnd, WorkerSpec
from selfloop.worker.protocol import (
    Call,
    Event,
    ModelInfo,
    Ready,
    Reply,
    Shutdown,
    call_decoder,
    encode,
    event_decoder,
)

INFO = ModelInfo(1, 1, 1, "float32", "cpu")


class Channel:
    """The worker's side: calls come in, events go out, each as the bytes that would cross a socket."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self.events: asyncio.Queue[tuple[bytes, bytes] | None] = asyncio.Queue()

    async def receive(self) -> tuple[Call, bytes]:
        call, payload = await self.calls.get()
        return call_decoder.decode(call), payload

    def send(self, event: Event, body: bytes = b"") -> None:
        self.events.put_nowait((encode(event), body))


Script = Callable[[Channel], Awaitable[None]]
"""What a worker does: its end is the worker's, and an error that it raises a crash with that text."""


async def echo(channel: Channel) -> None:
    """Is ready at once, and answers each call with its payload until it is asked to stop."""
    channel.send(Ready(INFO))
    while not isinstance((call := await channel.receive())[0].command, Shutdown):
        channel.send(Reply(call[0].ticket), call[1])


class FakeWorkerHandle:
    """See :class:`selfloop.worker.launchers.base.WorkerHandle`."""

    def __init__(self, name: str, script: Script) -> None:
        self.address = f"fake {name}"
        self.pid: int | None = None
        self.ended: asyncio.Future[WorkerEnd] = asyncio.get_running_loop().create_future()
        self._channel = Channel()
        self._cause: str | None = None
        self._running = asyncio.create_task(self._run(script), name=f"fake-worker-{name}")

    def send(self, call: Call, payload: bytes = b"") -> None:
        if not self.ended.done():
            self._channel.calls.put_nowait((encode(call), payload))

    async def events(self) -> AsyncGenerator[tuple[Event, bytes]]:
        while (frames := await self._channel.events.get()) is not None:
            yield event_decoder.decode(frames[0]), frames[1]

    async def kill(self, cause: str) -> None:
        if not self.ended.done():
            self._cause = cause
            self._running.cancel()
        await asyncio.wait({self._running})

    async def _run(self, script: Script) -> None:
        reason = "worker process exited with status 0"
        try:
            await script(self._channel)
        except asyncio.CancelledError:
            reason = self._cause or "cancelled"
        except Exception as error:  # The fake process's edge.
            reason = f"worker process exited with status 1: {error}"
        self.ended.set_result(WorkerEnd(reason))
        self._channel.events.put_nowait(None)


class FakeLauncher:
    """See :class:`selfloop.worker.launchers.base.Launcher`; what it was asked for is noted.

    Args:
        script: of every worker.
        fails: what a launch raises; it may also wait for ever.
    """

    def __init__(
        self, script: Script = echo, fails: OperationFailed | Exception | None = None, *, hangs: bool = False
    ) -> None:
        self._script = script
        self._fails = fails
        self._hangs = hangs
        self.specs: list[WorkerSpec] = []
        self.handles: list[FakeWorkerHandle] = []
        self.released: list[str] = []

    async def launch(self, spec: WorkerSpec, report: Callable[[str], None]) -> FakeWorkerHandle:
        self.specs.append(spec)
        report("loading the base model")
        if self._hangs:
            await asyncio.Event().wait()
        if self._fails is not None:
            raise self._fails
        self.handles.append(FakeWorkerHandle(spec.name, self._script))
        return self.handles[-1]

    def release(self, name: str) -> None:
        self.released.append(name)


class LauncherFromOutside(FakeLauncher):
    """As ``--launcher fake_launcher:LauncherFromOutside`` names it."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__()
        self.data_dir = data_dir
