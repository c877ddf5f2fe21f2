"""The gateway's half of the worker: calls go out, answers come back as futures. Light: no torch here."""

import asyncio
import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import zmq
import zmq.asyncio

from selfloop.types.errors import CheckpointDamaged, OperationFailed, WorkerLost
from selfloop.worker.launchers.fork_client import SILENCE_AT_START, ForkServerClient, WorkerProcess, describe_exit
from selfloop.worker.launchers.kernel_kills import num_kernel_kills
from selfloop.worker.launchers.local import WorkerCommand
from selfloop.worker.launchers.processes import make_socket_folder
from selfloop.worker.protocol import (
    Call,
    Command,
    Dying,
    LoadFailed,
    Loading,
    ModelInfo,
    Partial,
    Ready,
    Reply,
    ReplyError,
    Shutdown,
    encode,
    event_decoder,
    heartbeat_decoder,
)

log = logging.getLogger(__name__)

_STOP_GRACE_S = 20.0
_LOOK_EVERY_S = 0.5


class WorkerClient:
    """One incarnation of a worker process, from launch to exit.

    Every future it hands out ends: with the result's bytes, with :class:`OperationFailed` carrying the
    worker's own cause, or with :class:`WorkerLost` when the process is gone.
    """

    def __init__(self, command: WorkerCommand, on_loading: Callable[[str], None]) -> None:
        self._command = command
        self._on_loading = on_loading
        self._tickets = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._streams: dict[int, asyncio.Queue[bytes | None]] = {}
        self._dying: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._folder: Path | None = None
        self._process: WorkerProcess | None = None
        self._stopping = False
        self._kernel_kills = num_kernel_kills()
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, host: ForkServerClient) -> None:
        """Have ``host`` make the process; returns before it answers (see ``ready``).

        The socket lies in a folder of mode 0700 and takes that process alone.

        Raises:
            WorkerLost: the host is gone.
        """
        self._folder = make_socket_folder()
        address = f"ipc://{self._folder}/worker.sock"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._heartbeats = self._context.socket(zmq.PULL)
        heartbeats = f"ipc://{self._folder}/pulse.sock"
        try:
            self._process = await host.fork(address, heartbeats, self._folder / "begun")
        except WorkerLost as lost:
            self._lose(str(lost))
            raise
        # The kernel says who connects; the worker tries again until there is something to connect to.
        for socket, at in ((self._socket, address), (self._heartbeats, heartbeats)):
            socket.setsockopt(zmq.IPC_FILTER_PID, self._process.pid)
            socket.bind(at)
        self._tasks = [
            asyncio.create_task(self._receive(), name="worker-receive"),
            asyncio.create_task(self._watch(self._process), name="worker-watch"),
            asyncio.create_task(self._watch_heartbeats(), name="worker-pulse"),
        ]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def call(self, command: Command, payload: bytes = b"") -> asyncio.Future[bytes]:
        """Send a command (also before ``ready``: it waits in the worker's queue)."""
        return self._send(next(self._tickets), command, payload)

    def _send(self, ticket: int, command: Command, payload: bytes = b"") -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.lost.done():
            future.set_exception(WorkerLost(self.lost.result()))
            return future
        self._waiting[ticket] = future
        # With no high-water mark a PAIR socket takes the message at once, so order is the order of calls.
        self._socket.send_multipart([encode(Call(ticket, command)), payload], copy=False)
        return future

    async def stream(self, command: Command) -> AsyncGenerator[bytes]:
        """Send a command that answers in parts; yields each part, then the answer itself.

        Raises:
            OperationFailed: the worker refused or failed, also after parts.
            WorkerLost: the process ended.
        """
        parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        ticket = next(self._tickets)
        self._streams[ticket] = parts
        answer = self._send(ticket, command)
        answer.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            yield answer.result()
        finally:
            self._streams.pop(ticket, None)
            answer.add_done_callback(_retrieve)

    async def stop(self) -> None:
        """Ask the process to exit, then make it."""
        self._stopping = True
        if not self.lost.done():
            self.call(Shutdown()).add_done_callback(_retrieve)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.lost), _STOP_GRACE_S)
        await self.kill("stopped")

    async def kill(self, reason: str) -> None:
        """End the process now, if it was started, and let go of everything it held."""
        if self._process is not None:
            self._process.kill()
            await asyncio.wait({self._process.ended})
        self._lose(reason)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._folder is not None:
            self._socket.close()
            self._heartbeats.close(linger=0)
            self._context.term()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            match event_decoder.decode(frames[0]):
                case Reply(ticket):
                    self._complete(ticket, lambda future, body=frames[1]: future.set_result(body))
                case ReplyError(ticket, error, error_class, state_lost):
                    failure = _failure(error, error_class, state_lost=state_lost)
                    self._complete(ticket, lambda future, failure=failure: future.set_exception(failure))
                case Partial(ticket):
                    if ticket in self._streams:
                        self._streams[ticket].put_nowait(frames[1])
                case Dying(cause):
                    self._dying = cause
                case Loading(stage):
                    self._on_loading(stage)
                case Ready(info):
                    if not self.ready.done():
                        self.ready.set_result(info)
                case LoadFailed(cause, error_class):
                    if not self.ready.done():
                        self.ready.set_exception(OperationFailed(cause, error_class))
                        self.ready.exception()

    def _complete(self, ticket: int, complete: Callable[[asyncio.Future[bytes]], None]) -> None:
        future = self._waiting.pop(ticket, None)
        if future is not None and not future.done():
            complete(future)

    async def _watch(self, process: WorkerProcess) -> None:
        code = await asyncio.shield(process.ended)
        # Answers that were sent before the process ended are still on the socket.
        await asyncio.sleep(0.05)
        self._lose("stopped" if self._stopping else self._dying or process.cause or describe_exit(code))

    async def _watch_heartbeats(self) -> None:
        """End the process when nothing is heard of it, or when it has been at one thing for too long."""
        command = self._command
        now = time.monotonic()
        heard_at, busy_s = now + (SILENCE_AT_START - 1) * command.settings.heartbeat_timeout_s, 0.0
        while True:
            while await self._heartbeats.poll(0):
                heard_at, busy_s = time.monotonic(), heartbeat_decoder.decode(await self._heartbeats.recv()).busy_s
            if time.monotonic() - heard_at > command.settings.heartbeat_timeout_s:
                self._end(f"worker process gave no sign of life for {command.settings.heartbeat_timeout_s:g} s")
            elif busy_s > command.settings.operation_timeout_s:
                self._end(f"worker process hung: {busy_s:.0f} s at one piece of work (--operation-timeout)")
            before = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)
            # If it was we who stood still, what the worker said meanwhile is yet to be read.
            heard_at += max(time.monotonic() - before - 2 * _LOOK_EVERY_S, 0.0)

    def _end(self, cause: str) -> None:
        if self._dying is None:
            log.error("%s: ending process %d", cause, self.pid)
            self._dying = cause
        assert self._process is not None
        self._process.kill()

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        if not self.ready.done():
            self.ready.set_exception(WorkerLost(reason))
            self.ready.exception()
        # We end it by the same signal, and then say why.
        by_kernel = self._dying is None and "SIGKILL" in reason and num_kernel_kills() > self._kernel_kills
        begun = _read_begun(self._folder / "begun") if self._folder is not None and self._waiting else set[int]()
        for ticket, future in self._waiting.items():
            if not future.done():
                future.set_exception(WorkerLost(reason, begun=ticket in begun, by_kernel=by_kernel))
                _retrieve(future)
        self._waiting.clear()


def _read_begun(path: Path) -> set[int]:
    try:
        return {int(ticket) for ticket in path.read_bytes().partition(b"\n")[0].split()}
    except FileNotFoundError:
        return set()  # It died before it had opened it.


def _failure(error: str, error_class: str, *, state_lost: bool) -> OperationFailed:
    """The worker's refusal, as the class that it was raised as."""
    if error_class == "CheckpointDamaged":
        return CheckpointDamaged(error)
    return OperationFailed(error, error_class, state_lost=state_lost)


def _retrieve(future: asyncio.Future[bytes]) -> None:
    # Marks the exception as seen: a caller that was cancelled will not come for it.
    if future.done() and not future.cancelled():
        future.exception()
