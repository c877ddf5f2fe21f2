"""Bytes on the local disk, under one root. A blob appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from selfloop.types.blob_ref import DATA, BlobRef


class LocalBlobs:
    """Keys are relative paths such as ``journal/<run>/<operation>``; they are made by us, never by a client."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """The path of a key's blob. Raises :class:`ValueError` for a key that leads out of the root."""
        path = self.root / key
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"not below the root of blobs: {key!r}")
        return path

    def ref(self, key: str) -> BlobRef:
        """The reference to a key's blob that a worker receives."""
        return BlobRef(DATA, key)

    def put(self, key: str, data: bytes) -> None:
        """Store durably: written aside, synced, renamed."""
        path = self.path(key)
        _make_folder(path.parent)
        aside = path.with_name(path.name + ".part")
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
        except OSError:
            # On a full disk, what was written of it is in the way of everything else.
            aside.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)

    def get(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def delete(self, key: str) -> None:
        """Remove a file or a folder; absent is fine."""
        path = self.path(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def prepare_folder(self, key: str) -> Path:
        """Make room for a folder that somebody else will create at ``key``."""
        self.delete(key)
        path = self.path(key)
        _make_folder(path.parent)
        return path

    def publish_folder(self, aside_key: str, key: str) -> None:
        """Give a folder that was written and synced aside its final name, durably."""
        target = self.path(key)
        _make_folder(target.parent)
        if target.is_dir():
            # Left by a crash between this rename and its record: the same content, written again.
            shutil.rmtree(target)
        self.path(aside_key).rename(target)
        sync_directory(target.parent)

    def link_folder(self, source: Path, key: str) -> None:
        """A folder with the same files, which stay when the source is deleted: linked where the disk can, else copied.

        Only for files that are never written again.
        """
        target = self.prepare_folder(key + ".part")
        shutil.copytree(source, target, copy_function=_link_or_copy)
        for folder, _, _ in os.walk(target):
            sync_directory(Path(folder))
        self.publish_folder(key + ".part", key)

    def free_bytes(self) -> int:
        """What the disk has left for us."""
        return shutil.disk_usage(self.root).free

    def free_files(self) -> int | None:
        """How many more files and folders the disk takes; None where it has no such limit."""
        found = os.statvfs(self.root)
        return found.f_favail if found.f_files else None

    def children(self, key: str) -> Iterator[str]:
        """Names directly under ``key``."""
        folder = self.path(key)
        if folder.is_dir():
            yield from (entry.name for entry in folder.iterdir())


def _make_folder(folder: Path) -> None:
    """Create ``folder`` and what leads to it, each durably: a synced file in a folder that is lost is lost."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
