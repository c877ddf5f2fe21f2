"""The process that holds a base model and makes its workers by fork: one that dies is followed by the next at once.

Once the model is loaded it computes nothing, and what it has loaded it shares with its worker, page by page. It has one
thread: a fork copies only the thread that calls it, and a child that lacks the others of a pool hangs in its first
parallel loop. When its gateway is gone it ends the worker and waits a while for the gateway that comes after. A GPU's
memory cannot be shared so: there each worker loads the model itself, and finds the libraries loaded.
"""

import contextlib
import ctypes
import gc
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Asking CUDA itself whether there is a GPU would keep it from ever working in a child.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from selfloop.engine.backends.device import pick_device
from selfloop.types.logline import JsonFormatter
from selfloop.worker.launchers.fork_protocol import (
    HEARTBEAT_S,
    Alive,
    Exited,
    Forked,
    ForkServerFailed,
    ForkServerMessage,
    ForkServerReady,
    ForkWorker,
    fork_decoder,
    peer_user,
    start_decoder,
    to_line,
)
from selfloop.worker.launchers.kernel_kills import be_ended_first
from selfloop.worker.serving.process import Model, load_failure, load_model, run_worker

log = logging.getLogger("selfloop.worker")

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# For one message to or from a gateway that has begun to send it, or has room for it.
_MESSAGE_S = 60.0
# A thread that was joined is still in the kernel's list for a moment.
_THREAD_END_S = 5.0


def call_this_process(name: str) -> None:
    """What ``ps`` shows as the command's name; at most 15 characters."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def _die_with(parent_pid: int) -> None:
    """End this process when its fork server is gone."""
    if sys.platform == "linux":
        # At once, so that no late write of ours meets the next worker's.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


class ForkServer:
    """Serves one gateway after another, each with one worker at a time.

    Args:
        load: gives a worker its model; called in the worker.
        num_threads: of a worker's computations.
        linger_s: how long to wait for a gateway, before the first and after each.
    """

    def __init__(self, listener: socket.socket, load: Callable[[], Model], num_threads: int, linger_s: float) -> None:
        self._listener = listener
        self._load = load
        self._num_threads = num_threads
        self._listener.settimeout(linger_s)
        self._waiting: list[socket.socket] = []
        """Connections of gateways that came while the model was loaded, the first one first."""
        self._worker: tuple[int, int] | None = None
        """Its process id, and a descriptor that is readable once it has ended."""

    def run(self) -> None:
        """Return when no gateway has come for so long."""
        while (connection := self._next_gateway()) is not None:
            with connection:
                try:
                    self._serve(connection)
                except OSError as error:  # The gateway has died in the middle of a word, or does not listen.
                    log.info("the gateway is gone: %s", error)
                # Before the next gateway is heard: nothing of this worker may be written under the next one's.
                self._end_worker()

    def _next_gateway(self) -> socket.socket | None:
        if self._waiting:
            return self._waiting.pop(0)
        while True:
            try:
                connection, _ = self._listener.accept()
            except (TimeoutError, BlockingIOError):
                return None
            if peer_user(connection) == os.getuid():
                return connection
            connection.close()

    def hold(self) -> None:
        """Load the model here, for every worker to come."""
        loading = _WhileLoading(self._listener)
        try:
            model = self._load()
            model.engine.warm_up()
        finally:
            self._waiting = loading.end()
        self._load = lambda: model
        # Collected in a worker, it would be copied page by page.
        gc.collect()
        gc.freeze()

    def leave(self, record: Path | None) -> None:
        """Remove what led to us: nobody has come."""
        path = Path(self._listener.getsockname())
        if record is not None and record.is_file() and str(path).encode() in record.read_bytes():
            record.unlink(missing_ok=True)
        shutil.rmtree(path.parent, ignore_errors=True)

    def refuse(self, cause: str, error_class: str) -> None:
        """Say to the gateways that wait for us why there is no model."""
        for connection in self._waiting:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_MESSAGE_S)
                _say(connection, ForkServerFailed(cause, error_class))

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(_MESSAGE_S)
        _say(connection, ForkServerReady(os.getpid()))
        inbox = connection.makefile("rb")
        while True:
            ended = [] if self._worker is None else [self._worker[1]]
            readable, _, _ = select.select([connection, *ended], [], [], HEARTBEAT_S)
            _beat(connection)
            if ended and ended[0] in readable:
                _say(connection, self._bury())
            if connection in readable:
                line = inbox.readline()
                if not line:
                    return
                self._end_worker()
                _say(connection, Forked(self._fork(fork_decoder.decode(line), connection)))

    def _fork(self, order: ForkWorker, connection: socket.socket) -> int:
        if sys.platform == "linux" and (num := _num_threads()) > 1:
            log.error("the fork server has %d threads: a worker may hang", num)
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._live_as_worker(order, connection, server_pid)
        self._worker = pid, os.pidfd_open(pid)
        return pid

    def _live_as_worker(self, order: ForkWorker, connection: socket.socket, server_pid: int) -> None:
        code = 1
        try:
            call_this_process("selfloop-worker")
            self._listener.close()
            for gateway in (connection, *self._waiting):
                gateway.close()
            # The log may have been put aside since the fork server opened it.
            descriptor = os.open(order.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os.close(descriptor)
            _die_with(server_pid)
            torch.set_num_threads(self._num_threads)
            run_worker(order, self._load)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # The child's edge: it must never go on as a second fork server.
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _bury(self) -> Exited:
        assert self._worker is not None
        (pid, descriptor), self._worker = self._worker, None
        os.close(descriptor)
        return Exited(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    def _end_worker(self) -> None:
        if self._worker is not None:
            os.kill(self._worker[0], signal.SIGKILL)
            self._bury()


class _WhileLoading:
    """Lets gateways hear that we live while the model is loaded, in a thread that has ended before the first fork."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connections: list[socket.socket] = []
        self._over, self._end_it = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            readable, _, _ = select.select([self._listener, self._over], [], [], HEARTBEAT_S)
            is_over = self._over in readable
            if self._listener in readable:
                connection, _ = self._listener.accept()
                if peer_user(connection) == os.getuid():
                    connection.settimeout(0)
                    self._connections.append(connection)
                else:
                    connection.close()
            for connection in self._connections.copy():
                try:
                    _beat(connection)
                except OSError:
                    connection.close()
                    self._connections.remove(connection)

    def end(self) -> list[socket.socket]:
        """End the thread; returns the connections that are still there."""
        self._end_it.send(b"\0")
        self._thread.join()
        self._over.close()
        self._end_it.close()
        deadline = time.monotonic() + _THREAD_END_S
        while sys.platform == "linux" and _num_threads() > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        return self._connections


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _beat(connection: socket.socket) -> None:
    """Send a heartbeat, unless what was sent before is still unread."""
    if select.select([], [connection], [], 0)[1]:
        connection.send(to_line(Alive()))


def _say(connection: socket.socket, message: ForkServerMessage) -> None:
    connection.sendall(to_line(message))


def main() -> None:
    listener_fd, message = sys.argv[1:]
    start = start_decoder.decode(message)

    call_this_process("selfloop-host")
    be_ended_first()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    num_threads = start.engine.num_threads or torch.get_num_threads()
    torch.set_num_threads(1)
    model_dir = Path(start.model_dir)
    listener = socket.socket(fileno=int(listener_fd))
    server = ForkServer(listener, lambda: load_model(model_dir, start.engine), num_threads, start.linger_s)
    if pick_device(start.engine.device).type == "cpu":
        try:
            server.hold()
        except Exception as error:  # Reported to the gateway, which shows it to whoever waits for this model.
            log.exception("cannot load %s", model_dir)
            server.refuse(*load_failure(error))
            raise SystemExit(1) from error
    server.run()
    server.leave(None if start.record is None else Path(start.record))


if __name__ == "__main__":
    main()
