"""What a worker does beside its main loop: write snapshots, and tell its gateway what the loop is at."""

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import zmq

from selfloop.types.errors import OperationFailed
from selfloop.worker.protocol import Heartbeat, Written, encode

log = logging.getLogger("selfloop.worker")

BEAT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Finished:
    """A snapshot's end: what it cost, or why it failed."""

    ticket: int
    written: Written | None
    error: OperationFailed | None = None


class SnapshotWriter:
    """Writes one snapshot at a time in a thread: a second copy of a state would wait in memory only."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._finished: list[Finished] = []

    @property
    def is_busy(self) -> bool:
        return self._thread is not None

    def begin(self, ticket: int, write: Callable[[], object], stall_s: float) -> None:
        """Start ``write``; ``stall_s`` is what the copy took from the main loop."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._write, args=(ticket, write, stall_s), daemon=True)
        self._thread.start()

    def take_finished(self) -> list[Finished]:
        """Ends since the last call."""
        if self._thread is None or self._thread.is_alive():
            return []
        self._thread = None
        finished, self._finished = self._finished, []
        return finished

    def _write(self, ticket: int, write: Callable[[], object], stall_s: float) -> None:
        try:
            write()
        except Exception as error:  # The thread's edge: a full disk costs this snapshot only.
            log.warning("snapshot failed: %s", error)
            failed = OperationFailed(f"{type(error).__name__}: {error}", type(error).__name__)
            self._finished.append(Finished(ticket, None, failed))
        else:
            self._finished.append(Finished(ticket, Written(stall_s, time.thread_time())))


class Pulse:
    """Tells the gateway, from a thread of its own, how long the main loop has been at one piece of work."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._since: float | None = None

    def start(self) -> None:
        threading.Thread(target=self._beat, daemon=True).start()

    @contextmanager
    def at_work(self) -> Generator[None]:
        """The block is one piece of work."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _beat(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self._address)
        while True:
            since = self._since
            busy_s = 0.0 if since is None else time.monotonic() - since
            socket.send(encode(Heartbeat(busy_s)))
            time.sleep(BEAT_EVERY_S)
