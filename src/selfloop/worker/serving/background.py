"""What a worker does beside its main loop: write snapshots, and report to its gateway what the loop is at."""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import zmq

from selfloop.worker.protocol import Heartbeat, Written, encode

BEAT_EVERY_S = 0.5


class SnapshotWriter:
    """Writes one snapshot at a time in a thread: a second copy of a state would wait in memory only."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._under_way: tuple[int, Future[Written]] | None = None

    @property
    def is_busy(self) -> bool:
        return self._under_way is not None

    def begin(self, ticket: int, write: Callable[[], object], stall_s: float) -> None:
        """Start ``write``; ``stall_s`` is what the copy took from the main loop."""
        assert self._under_way is None

        def written() -> Written:
            started = time.thread_time()
            write()
            return Written(stall_s, time.thread_time() - started)

        self._under_way = ticket, self._thread.submit(written)

    def take_finished(self) -> tuple[int, Future[Written]] | None:
        """The call whose snapshot has come to its end since this was asked last, and that end."""
        if self._under_way is None or not self._under_way[1].done():
            return None
        finished, self._under_way = self._under_way, None
        return finished


class Heartbeats:
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
