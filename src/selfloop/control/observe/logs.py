"""Structured log lines on disk: appended in batches, kept within bounds, read back by the ids they carry."""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

import msgspec

from selfloop.types.logline import JsonFormatter, LogLine, decoder

log = logging.getLogger(__name__)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_FILE = "events.jsonl"
_MAX_BYTES = 32 * 1024 * 1024
_NUM_BACKUPS = 7
_KEPT_S = 8 * 86400.0
_PRUNE_EVERY_S = 3600.0
_WRITE_EVERY_S = 0.2
# What may wait for a disk that has stopped taking writes.
_MAX_PENDING = 100_000
_BLOCK_BYTES = 64 * 1024


class _Target(RotatingFileHandler):
    """Tells once that lines cannot be written, not with a traceback of each, until some can be again."""

    _is_reported = False

    def emit(self, record: logging.LogRecord) -> None:
        self._has_failed = False
        super().emit(record)
        self._is_reported = self._has_failed

    def handleError(self, record: logging.LogRecord) -> None:
        self._has_failed = True
        if not self._is_reported:
            log.warning("lines of the log cannot be written to %s: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        # What it could not write it tries once more; that it cannot is logged.
        with contextlib.suppress(OSError):
            super().close()


class LogFile(logging.Handler):
    """Writes records from a thread of its own: whoever logs pays for the formatting only."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._pending: deque[str] = deque(maxlen=_MAX_PENDING)
        self._target = _Target(
            folder / LOG_FILE, maxBytes=_MAX_BYTES, backupCount=_NUM_BACKUPS, encoding="utf-8", delay=True
        )
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self.setFormatter(JsonFormatter())
        self._thread = threading.Thread(target=self._write, name="log-file", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self._pending.append(self.format(record))

    def flush(self) -> None:
        """Put what was logged so far where a reader finds it (no sync to the disk)."""
        with self._writing:
            lines: list[str] = []
            while self._pending:
                lines.append(self._pending.popleft())
            if lines:
                self._target.emit(logging.makeLogRecord({"msg": "\n".join(lines)}))

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.flush()
        self._target.close()
        super().close()

    def _write(self) -> None:
        prune_at = 0.0
        while not self._stopping.wait(_WRITE_EVERY_S):
            self.flush()
            if time.monotonic() >= prune_at:
                prune_at = time.monotonic() + _PRUNE_EVERY_S
                prune(self._folder, time.time() - _KEPT_S)


def flush() -> None:
    """Make every line that was logged in this process readable."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFile):
            handler.flush()


def prune(folder: Path, before: float) -> None:
    """Remove rotated files whose last line is older than ``before`` (UNIX seconds)."""
    for path in folder.glob(LOG_FILE + ".*"):
        if path.stat().st_mtime < before:
            path.unlink()


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Which lines to read.

    Args:
        ids: deployments, runs and samplers; a line about any of them is wanted.
        model: also the events of this base model's worker that are about nobody's run, from ``model_since_ms`` on.
        team_id: lines of any other team are left out, whatever their ids.
        min_level: None keeps lines without a level too.
        request_id: only lines about this operation.
        includes: substrings that the text must all have.
        excludes: substrings of which the text must have none.
    """

    ids: frozenset[str]
    team_id: str
    start_ms: int
    end_ms: int
    model: str = ""
    model_since_ms: int = 0
    newest_first: bool = True
    limit: int = 500
    min_level: str | None = None
    request_id: str | None = None
    includes: list[str] = field(default_factory=list[str])
    excludes: list[str] = field(default_factory=list[str])

    def wants(self, line: LogLine) -> bool:
        if line.team_id and line.team_id != self.team_id:
            return False
        named = {line.deployment_id, line.run_id, line.sampler_id} - {""}
        if named:
            if not named & self.ids:
                return False
        elif not self.model or line.model != self.model or line.at_ns < self.model_since_ms * 1_000_000:
            return False
        if self.min_level is not None and (
            line.level not in LEVELS or LEVELS.index(line.level) < LEVELS.index(self.min_level)
        ):
            return False
        if self.request_id is not None and line.operation_id != self.request_id:
            return False
        text = line.text
        return all(part in text for part in self.includes) and not any(part in text for part in self.excludes)


def read(folder: Path, query: LogQuery) -> list[LogLine]:
    """The wanted lines in order of time, at most ``query.limit``; memory stays bounded whatever the files hold."""
    found: list[LogLine] = []
    names = [*query.ids, *([msgspec.json.encode(query.model).decode()[1:-1]] if query.model else [])]
    wanted = re.compile(b'"(?:' + b"|".join(re.escape(name.encode()) for name in names) + b')"')
    start_ns, end_ns = query.start_ms * 1_000_000, query.end_ms * 1_000_000
    with ExitStack() as stack:
        files = [stack.enter_context(file) for file in _opened(folder, query.start_ms / 1000)]
        for raw in _backwards(files) if query.newest_first else _forwards(files):
            if wanted.search(raw) is None:
                continue
            line = _decoded(raw)
            if line is None or line.at_ns > end_ns:
                continue
            if line.at_ns < start_ns:
                if query.newest_first:
                    break
                continue
            if query.wants(line):
                found.append(line)
                if len(found) == query.limit:
                    break
    return found


def _opened(folder: Path, start_s: float) -> Generator[IO[bytes]]:
    """The files that reach into the window, oldest first; all opened before any is read, as they may rotate."""
    seen: set[int] = set()
    opened: list[IO[bytes]] = []
    for number in range(_NUM_BACKUPS + 1):
        path = folder / (LOG_FILE if number == 0 else f"{LOG_FILE}.{number}")
        try:
            file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            continue
        stat = os.fstat(file.fileno())
        if stat.st_ino in seen or stat.st_mtime < start_s:
            file.close()
            continue
        seen.add(stat.st_ino)
        opened.append(file)
    yield from reversed(opened)


def _forwards(files: list[IO[bytes]]) -> Iterator[bytes]:
    for file in files:
        yield from file


def _backwards(files: list[IO[bytes]]) -> Iterator[bytes]:
    for file in reversed(files):
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end > 0:
            size = min(_BLOCK_BYTES, end)
            end -= size
            file.seek(end)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
            rest = first
        yield rest


def _decoded(raw: bytes) -> LogLine | None:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # The last line of a process that was killed in the middle of it.
