"""The gateway's side of a base model's host: launched, or taken over from a gateway that died; it makes workers."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import msgspec

import selfloop
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.worker.host_protocol import (
    Exited,
    Forked,
    ForkWorker,
    HostFailed,
    HostReady,
    host_decoder,
    peer_user,
    to_line,
)
from selfloop.worker.launch_local import WorkerCommand, host_arguments, launch_host, put_aside_large_log

log = logging.getLogger(__name__)

_MAX_LINE_BYTES = 2**20
_LEAST_LOAD_S = 60.0
_NO_CODE = -signal.SIGKILL


class HostRecord(msgspec.Struct, frozen=True):
    """Where a host listens, and what it was loaded with: it is of use to who wants just that."""

    socket: str
    made_of: list[str]


class WorkerProcess:
    """A worker that a host has made. It is the host's child, not ours."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Its exit code; below zero the signal that ended it."""
        self._descriptor: int | None = _open_process(pid)

    def kill(self) -> None:
        """``kill -9``, of this very process even if its number is another's by now."""
        if not self.ended.done():
            _kill(self._descriptor)

    def end(self, code: int) -> None:
        if not self.ended.done():
            self.ended.set_result(code)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class WorkerHost:
    """One host process. Make it with :func:`find_or_launch`."""

    def __init__(
        self, command: WorkerCommand, folder: Path, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> None:
        self._command = command
        self._made_of = made_of(command)
        self._folder = folder
        self._reader, self._writer = connection
        self._descriptor: int | None = None
        self._launched: asyncio.subprocess.Process | None = None
        self._worker: WorkerProcess | None = None
        self._forked: asyncio.Future[int] | None = None
        self._reading: asyncio.Task[None] | None = None
        self.is_lost = False

    def serves(self, command: WorkerCommand) -> bool:
        """Whether what ``command`` asks for is what lies in its memory."""
        return not self.is_lost and self._made_of == made_of(command)

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            OperationFailed: it cannot be.
            WorkerLost: the host is gone.
        """
        if self._reading is not None:
            return
        # The shortest operations that somebody wants to wait for say nothing of a load.
        patience_s = max(self._command.stuck_s, _LEAST_LOAD_S)
        try:
            first = await asyncio.wait_for(self._reader.readline(), patience_s)
        except TimeoutError:
            self.end()
            raise WorkerLost(f"the base model was not loaded within {patience_s:g} s") from None
        except OSError:
            first = b""
        if not first:
            raise WorkerLost(await self._cause_of_end())
        match host_decoder.decode(first):
            case HostReady(pid):
                self._descriptor = _open_process(pid)
                self._reading = asyncio.create_task(self._read(), name="worker-host")
            case HostFailed(cause):
                self.end()
                raise OperationFailed(cause, "LoadFailed")
            case Forked() | Exited():
                raise AssertionError("a host greets first")

    async def fork(self, address: str, pulse_address: str, begun_path: Path) -> WorkerProcess:
        """A worker that connects to both addresses and dies with its host, or when we let go of that.

        Raises:
            WorkerLost: the host is gone, or does not answer.
        """
        assert self._forked is None
        command = self._command
        put_aside_large_log(command.log_path)
        order = ForkWorker(address, pulse_address, str(begun_path), str(command.log_path), command.training_share)
        self._forked = asyncio.get_running_loop().create_future()
        try:
            if self.is_lost:
                raise WorkerLost("the process that has the base model in memory is gone")
            self._writer.write(to_line(order))
            self._worker = WorkerProcess(await asyncio.wait_for(self._forked, command.silence_s))
        except TimeoutError:
            self.end()
            cause = f"the process that has the base model in memory was silent for {command.silence_s:g} s"
            raise WorkerLost(cause) from None
        finally:
            self._forked = None
        return self._worker

    def end(self) -> None:
        """End the host and its worker at once, and forget where it was: the memory is free again."""
        if self.is_lost:
            return
        if self._launched is not None and self._launched.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._launched.kill()
        _kill(self._descriptor)
        self._lose()
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
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._launched is not None:
            await self._launched.wait()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                match host_decoder.decode(line):
                    case Forked(pid):
                        if self._forked is not None and not self._forked.done():
                            self._forked.set_result(pid)
                    case Exited(pid, code):
                        if self._worker is not None and self._worker.pid == pid:
                            self._worker.end(code)
                    case HostReady() | HostFailed():
                        raise AssertionError("a host greets once")
        except OSError as error:
            log.warning("the host of %s: %s", self._command.model_dir, error)
        self.end()

    def _lose(self) -> None:
        self.is_lost = True
        self._writer.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._worker is not None:
            # It dies with its host.
            self._worker.end(_NO_CODE)
        if self._forked is not None and not self._forked.done():
            self._forked.set_exception(WorkerLost("the process that has the base model in memory is gone"))

    async def _cause_of_end(self) -> str:
        launched = self._launched
        self.end()
        if launched is None:
            return "the process that loaded it is gone"
        return f"{describe_exit(await launched.wait())} ({self._command.log_path} may tell why)"


async def find_or_launch(command: WorkerCommand) -> WorkerHost:
    """The host that a gateway which died has left, if it is made of the same; else a new one."""
    found = None if command.record_path is None else await _find(command, command.record_path)
    return found or await _launch(command)


async def _find(command: WorkerCommand, record_path: Path) -> WorkerHost | None:
    try:
        record = msgspec.json.decode(record_path.read_bytes(), type=HostRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    folder = Path(record.socket).parent
    try:
        reader, writer = await asyncio.open_unix_connection(record.socket, limit=_MAX_LINE_BYTES)
    except OSError:
        record_path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    host = WorkerHost(command, folder, (reader, writer))
    if peer_user(writer.get_extra_info("socket")) != os.getuid():
        writer.close()
        return None
    if record.made_of != host._made_of:
        # Its own word tells which process it is.
        with contextlib.suppress(OperationFailed, WorkerLost):
            await host.ready()
        host.end()
        return None
    log.info("taking over the process that has %s in memory", command.model_dir)
    return host


async def _launch(command: WorkerCommand) -> WorkerHost:
    # Not in the data directory: a socket's path may not be longer than about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="selfloop-"))
    path = folder / "host.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        launched = await launch_host(command, listener)
    host = WorkerHost(command, folder, await asyncio.open_unix_connection(path, limit=_MAX_LINE_BYTES))
    host._launched = launched
    if command.record_path is not None:
        command.record_path.parent.mkdir(parents=True, exist_ok=True)
        aside = command.record_path.with_suffix(".part")
        aside.write_bytes(msgspec.json.encode(HostRecord(str(path), host._made_of)))
        aside.replace(command.record_path)
    return host


def made_of(command: WorkerCommand) -> list[str]:
    """All that tells one host from another: how it was loaded, from which files, by which code."""
    package = Path(selfloop.__file__).parent
    code = max(path.stat().st_mtime_ns for path in package.rglob("*.py"))
    files = sorted((path.name, path.stat().st_mtime_ns) for path in command.model_dir.iterdir())
    return [*host_arguments(command), selfloop.__version__, str(code), str(files)]


def describe_exit(code: int) -> str:
    """An exit status in words, e.g. ``worker process was killed by SIGKILL``."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"worker process was killed by {name}{hint}"
    return f"worker process exited with status {code}"


def _open_process(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


async def _ended(descriptor: int) -> None:
    """Wait for a process that need not be our child."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)


def _kill(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
