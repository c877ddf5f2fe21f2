"""Workers on this machine: forks of a process that holds the base model, spoken to over local sockets."""

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import zmq
import zmq.asyncio

from selfloop.types.blob_ref import DATA, local_path
from selfloop.types.settings import WorkerSettings
from selfloop.worker.launchers.base import WorkerEnd, WorkerSpec, worker_log_path
from selfloop.worker.launchers.fork_client import (
    SILENCE_AT_START,
    ForkServerClient,
    WorkerProcess,
    describe_exit,
    find_or_launch,
)
from selfloop.worker.launchers.fork_command import WorkerCommand
from selfloop.worker.launchers.kernel_kills import num_kernel_kills
from selfloop.worker.launchers.processes import make_socket_folder
from selfloop.worker.protocol import Call, Event, encode, event_decoder, heartbeat_decoder

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
# Answers that were sent before a process ended are still on the socket.
_LAST_ANSWERS_S = 0.05


class LocalLauncher:
    """Keeps a fork server for each base model; see :class:`selfloop.worker.launchers.base.Launcher`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._roots = {DATA: data_dir.absolute()}
        self._servers: dict[str, ForkServerClient] = {}

    async def launch(self, spec: WorkerSpec, report: Callable[[str], None]) -> "LocalWorker":
        command = self._command(spec)
        server = self._servers.get(spec.name)
        if server is None or not server.serves(command):
            if server is not None:
                await server.stop()
            server = self._servers[spec.name] = await find_or_launch(command)
        report("loading the base model")
        await server.ready()
        return await launch_worker(server, command)

    def release(self, name: str) -> None:
        server = self._servers.pop(name, None)
        if server is not None:
            server.end()

    def _command(self, spec: WorkerSpec) -> WorkerCommand:
        return WorkerCommand(
            local_path(spec.model, self._roots),
            worker_log_path(self._data_dir, spec.name),
            spec.settings,
            record_path=self._data_dir / "workers" / f"{spec.name.replace('/', '--')}.json",
            owner=spec.owner,
            roots=self._roots,
        )


async def launch_worker(server: ForkServerClient, command: WorkerCommand) -> "LocalWorker":
    """Have ``server``, which has loaded its model, make a worker.

    Raises:
        WorkerLost: the server is gone.
    """
    folder, num_kills = make_socket_folder(), num_kernel_kills()
    calls, heartbeats = f"ipc://{folder}/worker.sock", f"ipc://{folder}/heartbeat.sock"
    try:
        process = await server.fork(calls, heartbeats, folder / "begun")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return LocalWorker(process, folder, (calls, heartbeats), command.settings, num_kills)


class LocalWorker:
    """A worker process and the sockets to it, which lie in a folder of mode 0700 and take that process alone.

    Args:
        folder: of the sockets, which goes with it.
        addresses: that the process connects to, for calls and for heartbeats.
        num_kernel_kills: before there was a process.
    """

    def __init__(
        self,
        process: WorkerProcess,
        folder: Path,
        addresses: tuple[str, str],
        settings: WorkerSettings,
        num_kernel_kills: int,
    ) -> None:
        self._process = process
        self._folder = folder
        self._settings = settings
        self._num_kernel_kills = num_kernel_kills
        self._cause: str | None = None
        self._is_killed = False
        self._events: asyncio.Queue[tuple[Event, bytes] | None] = asyncio.Queue()
        self.address = f"pid {process.pid}"
        self.pid: int | None = process.pid
        self.ended: asyncio.Future[WorkerEnd] = asyncio.get_running_loop().create_future()
        self._context = zmq.asyncio.Context()
        self._calls = self._context.socket(zmq.PAIR)
        self._calls.set_hwm(0)
        self._calls.setsockopt(zmq.LINGER, 0)
        self._heartbeats = self._context.socket(zmq.PULL)
        # The kernel says who connects; the worker tries again until there is something to connect to.
        for socket, address in zip((self._calls, self._heartbeats), addresses, strict=True):
            socket.setsockopt(zmq.IPC_FILTER_PID, process.pid)
            socket.bind(address)
        self._receiving = asyncio.create_task(self._receive(), name="worker-receive")
        self._beating = asyncio.create_task(self._watch_heartbeats(), name="worker-heartbeats")
        self._watching = asyncio.create_task(self._watch(), name="worker-watch")

    def send(self, call: Call, payload: bytes = b"") -> None:
        if not self.ended.done():
            # With no high-water mark a PAIR socket takes the message at once, so order is the order of calls.
            self._calls.send_multipart([encode(call), payload], copy=False)

    async def events(self) -> AsyncGenerator[tuple[Event, bytes]]:
        while (event := await self._events.get()) is not None:
            yield event

    async def kill(self, cause: str) -> None:
        if not self._process.ended.done():
            self._cause = self._cause or cause
            self._is_killed = True
            self._process.kill()
        await asyncio.shield(self.ended)
        await asyncio.gather(self._receiving, self._beating, self._watching, return_exceptions=True)
        self._calls.close()
        self._heartbeats.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _receive(self) -> None:
        while True:
            event, body = await self._calls.recv_multipart()
            self._events.put_nowait((event_decoder.decode(event), body))

    async def _watch(self) -> None:
        code = await asyncio.shield(self._process.ended)
        if not self._is_killed:
            await asyncio.sleep(_LAST_ANSWERS_S)
        self._receiving.cancel()
        self._beating.cancel()
        cause = self._cause or self._process.cause
        reason = describe_exit(code)
        # We end it by the same signal, and then say why.
        by_kernel = cause is None and "SIGKILL" in reason and num_kernel_kills() > self._num_kernel_kills
        self.ended.set_result(WorkerEnd(cause or reason, _read_begun(self._folder / "begun"), by_kernel))
        self._events.put_nowait(None)

    async def _watch_heartbeats(self) -> None:
        """End the process when nothing is heard of it, or when it has been at one thing for too long."""
        silence_s, stuck_s = self._settings.heartbeat_timeout_s, self._settings.operation_timeout_s
        now = time.monotonic()
        heard_at, busy_s = now + (SILENCE_AT_START - 1) * silence_s, 0.0
        while True:
            while await self._heartbeats.poll(0):
                heard_at, busy_s = time.monotonic(), heartbeat_decoder.decode(await self._heartbeats.recv()).busy_s
            if time.monotonic() - heard_at > silence_s:
                self._end(f"worker process sent no heartbeat for {silence_s:g} s")
            elif busy_s > stuck_s:
                self._end(f"worker process hung: {busy_s:.0f} s at one piece of work (--operation-timeout)")
            before = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)
            # If it was we who stood still, what the worker said meanwhile is yet to be read.
            heard_at += max(time.monotonic() - before - 2 * _LOOK_EVERY_S, 0.0)

    def _end(self, cause: str) -> None:
        if self._cause is None:
            log.error("%s: ending %s", cause, self.address)
            self._cause = cause
        self._process.kill()


def _read_begun(path: Path) -> frozenset[int]:
    try:
        return frozenset(int(ticket) for ticket in path.read_bytes().partition(b"\n")[0].split())
    except FileNotFoundError:
        return frozenset()  # It died before it had opened it.
