"""The gateway's side of a base model's fork server: launched, or left by a gateway that died. It makes workers."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import msgspec

import selfloop
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.worker.launchers.fork_command import (
    WorkerCommand,
    launch_fork_server,
    put_aside_large_log,
)
from selfloop.worker.launchers.fork_protocol import (
    Alive,
    Exited,
    Forked,
    ForkServerFailed,
    ForkServerMessage,
    ForkServerReady,
    ForkWorker,
    message_decoder,
    peer_user,
    to_line,
)
from selfloop.worker.launchers.processes import (
    ProcessIdentity,
    boot_id,
    identify,
    kill,
    make_socket_folder,
    open_exactly,
    open_process,
)

log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 2**20
_LEAST_LOAD_S = 60.0
_NO_CODE = -signal.SIGKILL
_LOOK_EVERY_S = 0.5
_GONE = "the process that has the base model in memory is gone"

SILENCE_AT_START = 5
"""Times the usual limit: before its first heartbeat a process only imports, which a busy machine makes slow."""


class ForkServerRecord(msgspec.Struct, frozen=True):
    """Where a fork server listens, whose it is, and what it was loaded with: it is of use to who wants just that.

    Args:
        owner: of the data directory, see :class:`WorkerCommand`. Another's fork server is neither spoken to nor ended.
    """

    socket: str
    made_of: list[str]
    owner: str
    process: ProcessIdentity


class WorkerProcess:
    """A worker that a fork server has made. It is that process's child, not ours."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Its exit code; below zero the signal that ended it."""
        self.cause: str | None = None
        """Why it had to end, where its exit code does not show it."""
        self._descriptor: int | None = open_process(pid)

    def kill(self) -> None:
        """``kill -9``, of this very process even if its number is another's by now."""
        if not self.ended.done():
            kill(self._descriptor)

    def end(self, code: int, cause: str | None = None) -> None:
        if not self.ended.done():
            self.cause = cause
            self.ended.set_result(code)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class ForkServerClient:
    """One fork server process. Make it with :func:`find_or_launch`.

    It is watched from the first moment on: one that is silent for as long as a worker may be is ended, with its worker.
    """

    def __init__(
        self,
        command: WorkerCommand,
        folder: Path,
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        descriptor: int | None,
        launched: asyncio.subprocess.Process | None = None,
    ) -> None:
        """
        Args:
            folder: of its socket, which goes with it.
            descriptor: of its process, which is ours to close.
            launched: it, if it is our child.
        """
        self._command = command
        self._made_of = made_of(command)
        self._folder = folder
        self._reader, self._writer = connection
        self._descriptor = descriptor
        self._launched = launched
        self._worker: WorkerProcess | None = None
        self._forked: asyncio.Future[int] | None = None
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard_at = time.monotonic()
        self._silence_s = command.settings.heartbeat_timeout_s * (1 if launched is None else SILENCE_AT_START)
        self.is_lost = False
        self._reading = asyncio.create_task(self._read(), name="fork-server")
        self._watching = asyncio.create_task(self._watch(), name="fork-server-heartbeat")

    def serves(self, command: WorkerCommand) -> bool:
        """Whether what ``command`` asks for is what lies in its memory."""
        return not self.is_lost and self._made_of == made_of(command)

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            OperationFailed: it cannot be.
            WorkerLost: the fork server is gone.
        """
        # The shortest operations that somebody wants to wait for say nothing of a load.
        patience_s = max(self._command.settings.operation_timeout_s, _LEAST_LOAD_S)
        try:
            await asyncio.wait_for(asyncio.shield(self._greeted), patience_s)
        except TimeoutError:
            self.end(f"the base model was not loaded within {patience_s:g} s")
            await self._greeted

    async def fork(self, address: str, heartbeat_address: str, begun_path: Path) -> WorkerProcess:
        """A worker that connects to both addresses and dies with its fork server, or when we let go of that.

        Raises:
            WorkerLost: the fork server is gone, or does not answer.
        """
        assert self._forked is None
        command = self._command
        silence_s = command.settings.heartbeat_timeout_s
        put_aside_large_log(command.log_path)
        order = ForkWorker(
            address,
            heartbeat_address,
            str(begun_path),
            str(command.log_path),
            command.settings,
            {name: str(root.absolute()) for name, root in command.roots.items()},
        )
        self._forked = asyncio.get_running_loop().create_future()
        try:
            if self.is_lost:
                raise WorkerLost(_GONE)
            self._writer.write(to_line(order))
            self._worker = WorkerProcess(await asyncio.wait_for(self._forked, silence_s))
        except TimeoutError:
            cause = f"the process that has the base model in memory made no worker in {silence_s:g} s"
            self.end(cause)
            raise WorkerLost(cause) from None
        finally:
            self._forked = None
        return self._worker

    def end(self, cause: str = _GONE) -> None:
        """End the fork server and its worker at once, and forget where it was: the memory is free again."""
        if self.is_lost:
            return
        if self._launched is not None and self._launched.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._launched.kill()
        kill(self._descriptor)
        self._lose(cause)
        if self._command.record_path is not None:
            self._command.record_path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def stop(self) -> None:
        """End it, and wait until it is gone."""
        process = None if self._descriptor is None else os.dup(self._descriptor)
        self.end()
        if process is not None:
            await _ended(process)
            os.close(process)
        await asyncio.gather(self._reading, self._watching, return_exceptions=True)
        if self._launched is not None:
            await self._launched.wait()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._hear(message_decoder.decode(line))
        except (OSError, ValueError) as error:  # Also what is no message.
            log.warning("the fork server of %s: %s", self._command.model_dir, error)
        launched = None if self.is_lost else self._launched
        if launched is None or self._greeted.done():
            self.end()
            return
        # It has died while it loaded. Whoever waits for that hears how.
        kill(self._descriptor)
        code = await launched.wait()
        self.end(f"{describe_exit(code)} ({self._command.log_path} may say why)")

    def _hear(self, message: ForkServerMessage) -> None:
        self._heard_at, self._silence_s = time.monotonic(), self._command.settings.heartbeat_timeout_s
        match message:
            case Alive():
                pass
            case ForkServerReady():
                if not self._greeted.done():
                    self._greeted.set_result(None)
            case ForkServerFailed(cause, error_class):
                if not self._greeted.done():
                    self._greeted.set_exception(OperationFailed(cause, error_class))
                self.end()
            case Forked(pid):
                if self._forked is not None and not self._forked.done():
                    self._forked.set_result(pid)
            case Exited(pid, code):
                if self._worker is not None and self._worker.pid == pid:
                    self._worker.end(code)

    async def _watch(self) -> None:
        while not self.is_lost:
            if time.monotonic() - self._heard_at > self._silence_s:
                cause = f"the process that has the base model in memory sent no heartbeat for {self._silence_s:g} s"
                log.error("%s: ending it", cause)
                self.end(cause)
                return
            before = time.monotonic()
            await asyncio.sleep(_LOOK_EVERY_S)
            # If it was we who stood still, what it said meanwhile is yet to be read.
            self._heard_at += max(time.monotonic() - before - 2 * _LOOK_EVERY_S, 0.0)

    def _lose(self, cause: str = _GONE) -> None:
        self.is_lost = True
        if asyncio.current_task() is not self._watching:
            self._watching.cancel()
        self._writer.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._worker is not None:
            # It dies with its fork server.
            self._worker.end(_NO_CODE, None if cause == _GONE else cause)
        for awaited in (self._greeted, self._forked):
            if awaited is not None and not awaited.done():
                awaited.set_exception(WorkerLost(cause))
        if not self._greeted.cancelled():
            self._greeted.exception()  # Seen: there may be nobody who waits for it any more.


async def find_or_launch(command: WorkerCommand) -> ForkServerClient:
    """The fork server that a gateway which died has left, if it is made of the same; else a new one."""
    found = None if command.record_path is None else await _find(command, command.record_path)
    return found or await _launch(command)


async def _find(command: WorkerCommand, record_path: Path) -> ForkServerClient | None:
    try:
        record = msgspec.json.decode(record_path.read_bytes(), type=ForkServerRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    if record.owner != command.owner:
        log.info("%s came with a copy of another server's data directory: not ours", record_path)
        return None
    folder = Path(record.socket).parent
    descriptor = open_exactly(record.process)
    if descriptor is None:
        record_path.unlink(missing_ok=True)
        # Of another boot or machine the folder's name may be somebody else's here.
        if record.process.boot == boot_id():
            shutil.rmtree(folder, ignore_errors=True)
        return None
    try:
        connection = await asyncio.open_unix_connection(record.socket, limit=_MAX_LINE_BYTES)
    except OSError as error:
        log.warning("the process that has %s in memory cannot be spoken to, and is ended: %s", command.model_dir, error)
        kill(descriptor)
        os.close(descriptor)
        record_path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if peer_user(connection[1].get_extra_info("socket")) != os.getuid():
        connection[1].close()
        os.close(descriptor)
        return None
    server = ForkServerClient(command, folder, connection, descriptor)
    if record.made_of != server._made_of:
        await server.stop()
        return None
    log.info("taking over the process that has %s in memory", command.model_dir)
    return server


async def _launch(command: WorkerCommand) -> ForkServerClient:
    folder = make_socket_folder()
    path = folder / "host.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # Before there is a fork server: if it dies at once, this connection ends, too.
        connection = await asyncio.open_unix_connection(path, limit=_MAX_LINE_BYTES)
        launched = await launch_fork_server(command, listener)
    server = ForkServerClient(command, folder, connection, open_process(launched.pid), launched)
    if command.record_path is not None and (process := identify(launched.pid)) is not None:
        command.record_path.parent.mkdir(parents=True, exist_ok=True)
        aside = command.record_path.with_suffix(".part")
        aside.write_bytes(msgspec.json.encode(ForkServerRecord(str(path), server._made_of, command.owner, process)))
        aside.replace(command.record_path)
    return server


def made_of(command: WorkerCommand) -> list[str]:
    """All that distinguishes one fork server from another: how it was loaded, from which files, by which code."""
    package = Path(selfloop.__file__).parent
    code = max(path.stat().st_mtime_ns for path in package.rglob("*.py"))
    files = sorted((path.name, path.stat().st_mtime_ns) for path in command.model_dir.iterdir())
    return [command.start_message, selfloop.__version__, str(code), str(files)]


def describe_exit(code: int) -> str:
    """An exit status in words, e.g. ``worker process was killed by SIGKILL``."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"worker process was killed by {name}{hint}"
    return f"worker process exited with status {code}"


async def _ended(descriptor: int) -> None:
    """Wait for a process that need not be our child."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
