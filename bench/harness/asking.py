"""Someone who asks the management API all the time, from a process of their own: what does each answer take?"""

import itertools
import multiprocessing
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple

import httpx

_PATIENCE_S = 120.0


class Asked(NamedTuple):
    """How long the answers took, in order, and the status codes that were not 200."""

    seconds: list[float]
    refused: dict[int, int]


class Asker:
    """Asks the paths in turn, one at a time, ``every_s`` apart, until :meth:`end`."""

    def __init__(self, url: str, key: str, paths: Sequence[str], every_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe(duplex=False)
        self._stop = context.Event()
        self._process = context.Process(target=_ask, args=(url, key, paths, every_s, self._stop, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def end(self) -> Asked:
        """What it met. Raises :class:`EOFError` when it broke off."""
        self._stop.set()
        asked: Asked = self._ours.recv()
        self._process.join()
        return asked

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def asking(url: str, key: str, paths: Sequence[str], every_s: float) -> Generator[Asker]:
    asker = Asker(url, key, paths, every_s)
    try:
        yield asker
    finally:
        asker.kill()


def _ask(url: str, key: str, paths: Sequence[str], every_s: float, stop: Event, results: Connection) -> None:
    seconds: list[float] = []
    refused: Counter[int] = Counter()
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=_PATIENCE_S) as http:
        for path in itertools.cycle(paths):
            if stop.wait(every_s):
                break
            started = time.perf_counter()
            status = http.get(path).status_code
            seconds.append(time.perf_counter() - started)
            if status != 200:
                refused[status] += 1
    results.send(Asked(seconds, dict(refused)))
