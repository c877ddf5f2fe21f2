"""Files over HTTP into a folder: resumed where an earlier attempt ended, and compared with what they should be.

``<name>.partial`` is what is there of a file, which gets its name when it is whole. Beside them lies which content each
is of: what a branch had before it moved is never put together with what it has now.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import httpx  # the HTTP library differs between its releases

from selfloop.convert.disk_space import check_room
from selfloop.convert.reports import Report
from selfloop.types.errors import OperationFailed

STATE_FILE = ".download.json"

_PARTIAL = ".partial"
_CHUNK_BYTES = 2**20
_AT_A_TIME = 4
_INTERVAL_S = 0.5
_TIMEOUT_S = 60.0
# In a row without a byte; after one that brought any, as often again.
_ATTEMPTS = 5
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_TOO_MANY, _OUT_OF_RANGE, _PARTIAL_CONTENT, _OK, _BROKEN = 429, 416, 206, 200, 500


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a model.

    Args:
        name: in the folder.
        version: stands for its content where there is no digest.
        sha256: hex, of its bytes.
    """

    name: str
    url: str
    size: int
    version: str
    sha256: str | None = None

    @property
    def identity(self) -> str:
        return self.sha256 or self.version


class Downloads:
    """Downloads into one folder.

    Args:
        headers: of every request to the files' own host; redirects to others go without a key.
        check: raises for an answer that is an error, in the words of that hub.
        pause: waits so many seconds before another attempt.
    """

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, str],
        check: Callable[[httpx.Response], object],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder, self._headers, self._check, self._pause = folder, dict(headers), check, pause
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._done_bytes = 0
        self._versions = self._read_state()

    def fetch(self, files: Collection[RemoteFile], report: Report, share: tuple[float, float] = (0.0, 1.0)) -> None:
        """Fetch what is not there yet; ``share`` is which part of the whole work this is.

        Raises:
            OperationFailed: a file is not what it should be, however often it comes, or the disk has no room.
            httpx.HTTPError: it cannot be had.
        """
        for file in files:
            self._keep_only(file)
        self._done_bytes = sum(self._here(file) for file in files)
        total = sum(file.size for file in files)
        check_room(self._folder, total - self._done_bytes, "what is left of the download")
        self._failed.clear()
        with (
            self._progress(total, report, share),
            httpx.Client(follow_redirects=True, timeout=_TIMEOUT_S) as client,
            ThreadPoolExecutor(_AT_A_TIME) as pool,
        ):
            tasks = [pool.submit(self._fetch, client, file) for file in files if not self._path(file).exists()]
            errors = [error for task in tasks if (error := task.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])

    def close(self) -> None:
        """Leave nothing but the files."""
        (self._folder / STATE_FILE).unlink(missing_ok=True)

    def _fetch(self, client: httpx.Client, file: RemoteFile) -> None:
        try:
            for is_last in (False, True):
                self._bring(client, file)
                wrong = _what_is_wrong(self._partial(file), file)
                if wrong is None:
                    self._partial(file).rename(self._path(file))
                    return
                self._add(-self._here(file))
                self._partial(file).unlink()
                if is_last:
                    raise OperationFailed(f"{file.name} came damaged twice: {wrong}")
        except BaseException:
            self._failed.set()  # The others stop, and go on from where they are another time.
            raise

    def _bring(self, client: httpx.Client, file: RemoteFile) -> None:
        """All bytes of the file, in as many answers as it takes."""
        left = _ATTEMPTS
        while (start := self._here(file)) < file.size or not self._partial(file).exists():
            try:
                self._stream(client, file, start)
            except (httpx.TransportError, _Again) as error:
                left = _ATTEMPTS if self._here(file) > start else left - 1
                if left == 0:
                    raise OperationFailed(f"{file.name} cannot be downloaded: {error}") from error
                self._pause(_PAUSES_S[min(_ATTEMPTS - left, len(_PAUSES_S)) - 1] if left < _ATTEMPTS else 0.0)

    def _stream(self, client: httpx.Client, file: RemoteFile, start: int) -> None:
        # Compressed, bytes could not be counted.
        headers = {**self._headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with client.stream("GET", file.url, headers=headers) as answer:
            status = answer.status_code
            if status == _TOO_MANY or status >= _BROKEN:
                raise _Again(f"the hub answered with status {status}")
            if status == _OUT_OF_RANGE or (status == _PARTIAL_CONTENT and _first_byte(answer) != start):
                self._restart(file)
                raise _Again("the hub has no such range of it")
            if status not in (_OK, _PARTIAL_CONTENT):
                answer.read()
                self._check(answer)
                raise OperationFailed(f"{file.name} cannot be downloaded: the hub answered with status {status}")
            if status == _OK and start:
                self._restart(file)  # It sends all of it, again.
            # As it comes, and unbuffered: whatever ends this process loses no more than what is on the way.
            with self._partial(file).open("ab", buffering=0) as partial:
                for chunk in answer.iter_raw():
                    if self._failed.is_set():
                        raise _Stopped
                    if partial.tell() + len(chunk) > file.size:
                        raise OperationFailed(f"{file.name} is longer than the {file.size} bytes that the hub says")
                    partial.write(chunk)
                    self._add(len(chunk))
        if self._here(file) < file.size:
            raise _Again("the answer ended too early")

    def _restart(self, file: RemoteFile) -> None:
        self._add(-self._here(file))
        self._partial(file).unlink(missing_ok=True)

    def _path(self, file: RemoteFile) -> Path:
        return self._folder / file.name

    def _partial(self, file: RemoteFile) -> Path:
        return self._folder / f"{file.name}{_PARTIAL}"

    def _here(self, file: RemoteFile) -> int:
        """Bytes of it that are on the disk."""
        for path in (self._path(file), self._partial(file)):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_size
        return 0

    def _keep_only(self, file: RemoteFile) -> None:
        """Remove what is of another content, and note what will be there."""
        path = self._path(file)
        path.parent.mkdir(exist_ok=True)
        if self._versions.get(file.name) != file.identity or self._here(file) > file.size:
            path.unlink(missing_ok=True)
            self._partial(file).unlink(missing_ok=True)
            self._versions[file.name] = file.identity
            (self._folder / STATE_FILE).write_text(json.dumps(self._versions), encoding="utf-8")

    def _read_state(self) -> dict[str, str]:
        try:
            return json.loads((self._folder / STATE_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}

    def _add(self, num_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes

    @contextmanager
    def _progress(self, total: int, report: Report, share: tuple[float, float]) -> Generator[None]:
        """Tells bytes and rate twice a second."""
        stopped, first, rate = threading.Event(), share[0], 0.0

        def watch() -> None:
            nonlocal rate
            before = self._done_bytes
            while not stopped.wait(_INTERVAL_S):
                now = self._done_bytes
                rate += 0.2 * (max(now - before, 0) / _INTERVAL_S - rate)
                before = now
                words = f"download {now / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.1f} MB/s"
                report(words, first + (share[1] - first) * min(now / max(total, 1), 1.0))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stopped.set()
            watcher.join()


class _Stopped(Exception):
    """Another file could not be had."""


class _Again(Exception):
    """What another attempt may mend."""


def _first_byte(answer: httpx.Response) -> int | None:
    """Of the part that an answer has: ``Content-Range: bytes 100-199/200``."""
    first = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdecimal() else None


def _what_is_wrong(path: Path, file: RemoteFile) -> str | None:
    size = path.stat().st_size
    if size != file.size:
        return f"it has {size} bytes, expected {file.size}"
    if file.sha256 is not None:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        return None if found == file.sha256 else f"it has sha256 {found}, expected {file.sha256}"
    return None
