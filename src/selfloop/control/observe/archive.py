"""The debug archive: what a maintainer needs to see of a deployment, behind links that need no key."""

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from selfloop.control.capacity import hardware
from selfloop.control.data_dir.signed_urls import LINK_LIFE_S, SignedUrls
from selfloop.control.observe import worker_output
from selfloop.control.observe.logs import LogQuery, read
from selfloop.storage.db.tables import StatusChangeRow
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import new_id

_MAX_LOG_LINES = 20_000
_WORKER_LINES = 2000


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    archive_id: str
    name: str
    size_bytes: int
    modified_at: float
    expires: int
    signature: str


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """What an archive is made of.

    Args:
        logs: the deployment's own lines.
        worker_log: output of the worker that serves it.
        run_ids: of the deployment; lines of the worker about other runs are left out.
    """

    deployment_id: str
    logs: LogQuery
    worker_log: Path
    run_ids: frozenset[str]
    changes: Sequence[StatusChangeRow]


class Archives:
    """Made anew for each first page and removed once its links have expired."""

    def __init__(self, data_dir: Path, links: SignedUrls) -> None:
        self._data_dir = data_dir
        self._folder = data_dir / "debug"
        self._signed_urls = links

    async def make(self, source: ArchiveSource) -> str:
        """Write an archive; returns its id, by which :meth:`files` and page tokens know it."""
        archive_id = f"{source.deployment_id}-{new_id()}"
        await asyncio.to_thread(self._write, self._folder / archive_id, source)
        return archive_id

    @property
    def logs_folder(self) -> Path:
        return self._data_dir / "logs"

    def add_file(self, owner_id: str, name: str, data: bytes) -> ArchiveFile:
        """Write an archive of a single file; returns it with a link. Raises :class:`OSError`."""
        self._remove_expired()
        archive_id = f"{owner_id}-{new_id()}"
        folder = self._folder / archive_id
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        (file,) = self._list(archive_id)
        return file

    async def files(self, deployment_id: str, archive_id: str) -> list[ArchiveFile]:
        """The files in a stable order, with links. Raises :class:`BadRequest` for a token that names no archive."""
        if not archive_id.replace("-", "").isalnum() or not archive_id.startswith(f"{deployment_id}-"):
            raise BadRequest("page_token", "the next_page_token of an answer about this deployment")
        return await asyncio.to_thread(self._list, archive_id)

    def open_signed_url(self, archive_id: str, name: str, expires: int, signature: str) -> Path:
        """The file behind a link. Raises :class:`Denied` for a bad or old link, :class:`NotFound` when gone."""
        self._signed_urls.check("debug", archive_id, name, expires, signature)
        path = self._folder / archive_id / name
        if path.resolve().parent.parent != self._folder.resolve() or not path.is_file():
            raise NotFound("file", f"{archive_id}/{name}")
        return path

    def _write(self, folder: Path, source: ArchiveSource) -> None:
        self._remove_expired()
        folder.mkdir(parents=True)
        lines = read(self._data_dir / "logs", source.logs)[::-1][-_MAX_LOG_LINES:]
        (folder / "logs.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        output = worker_output.tail(source.worker_log, num_lines=_WORKER_LINES, runs=source.run_ids)
        (folder / "worker.log").write_text("".join(line + "\n" for line in output), encoding="utf-8")
        history = [
            {"resource": c.resource, "id": c.resource_id, "status": c.status, "reason": c.reason, "at": c.at}
            for c in source.changes
        ]
        for name, facts in (
            ("status_history.json", history),
            ("versions.json", hardware.versions()),
            ("machine.json", hardware.facts(self._data_dir)),
        ):
            (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))

    def _list(self, archive_id: str) -> list[ArchiveFile]:
        folder = self._folder / archive_id
        if not folder.is_dir():
            raise BadRequest("page_token", f"one that is not older than {LINK_LIFE_S} s")
        files: list[ArchiveFile] = []
        for path in sorted(folder.iterdir()):
            stat = path.stat()
            link = self._signed_urls.sign("debug", archive_id, path.name)
            files.append(ArchiveFile(archive_id, path.name, stat.st_size, stat.st_mtime, link.expires, link.signature))
        return files

    def _remove_expired(self) -> None:
        # A page that was listed last may still hand out links for an hour.
        if self._folder.is_dir():
            for old in self._folder.iterdir():
                if old.stat().st_mtime < time.time() - 2 * LINK_LIFE_S:
                    shutil.rmtree(old, ignore_errors=True)
