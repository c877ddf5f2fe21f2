"""Where checkpoints lie: immutable folders of files, each of which is there whole or not at all."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfloop.storage.blobs.local import LocalBlobs
from selfloop.types.blob_ref import DATA, BlobRef, blob_ref
from selfloop.types.digests import MANIFEST_FILE, check_folder, damaged
from selfloop.types.safetensors_header import BadSafetensors, read_header

LOCAL = "local"
"""The address of the store in the data directory."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint: its path relative to the checkpoint, size, and time of writing."""

    name: str
    size_bytes: int
    modified_at: float


class CheckpointStore(Protocol):
    """Every call but ``staging``, ``ref``, ``is_at_hand`` and ``link`` may raise :class:`Unavailable` for a while."""

    address: str
    """Of the store, for people."""

    async def claim(self, owner: str) -> None:
        """Bind the store to one data directory. Raises :class:`Conflict` if it belongs to another."""
        ...

    async def check_reachable(self) -> None:
        """To be asked before anything is accepted that needs the store. Raises :class:`Unavailable`."""
        ...

    def staging(self, id: str) -> Path:
        """Make room for a folder on the local disk that somebody else will write, to be published or discarded."""
        ...

    async def discard(self, id: str) -> None:
        """Remove what was staged."""
        ...

    async def upload(self, id: str) -> None:
        """Do the slow part of publishing, which nobody sees yet. Raises :class:`FileNotFoundError`."""
        ...

    async def publish(self, id: str) -> None:
        """Give what was staged its name, durably; once more is fine. Raises :class:`FileNotFoundError`."""
        ...

    async def folder(self, id: str) -> Path:
        """The files on the local disk, to be read within the hour.

        Raises :class:`FileNotFoundError`, and :class:`OperationFailed` for files that are not what was stored.
        """
        ...

    def ref(self, folder: Path) -> BlobRef:
        """What a worker is given to find a folder of ``staging`` or ``folder``."""
        ...

    def is_at_hand(self, id: str) -> bool:
        """Whether ``folder`` answers from the local disk; what is at hand stays so for the hour."""
        ...

    async def check(self, id: str) -> None:
        """Check every file against its digest; files of before there were any are taken as they are.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointDamaged: a file is not what was stored.
        """
        ...

    async def verify(self, id: str) -> bool:
        """Read everything of it, in place; False where it has no digests, and its structure alone is sound.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointDamaged: a file is not what was stored, or no safetensors file inside.
        """
        ...

    async def strays(self, recorded: set[str]) -> list[str]:
        """Names of stored files of no ``recorded`` checkpoint; nothing where the data directory itself shows them."""
        ...

    async def files(self, id: str) -> list[StoredFile]:
        """In a stable order, less their manifest. Raises :class:`FileNotFoundError`."""
        ...

    def link(self, id: str, name: str, life_s: int) -> str | None:
        """An address of one file that needs no key; None where the store itself gives out none."""
        ...

    async def copy(self, source: str, id: str) -> None:
        """A checkpoint with the same files, which stay when the source is deleted."""
        ...

    async def delete(self, id: str) -> None:
        """Absent is fine. What cannot be removed now is cleared away at a later start."""
        ...

    async def clear_leftovers(self, recorded: set[str]) -> None:
        """Remove what a crash left: everything that is not ``recorded``."""
        ...


class LocalCheckpoints:
    """Folders ``checkpoints/<id>`` of the data directory."""

    def __init__(self, blobs: LocalBlobs) -> None:
        self._blobs = blobs
        self.address = LOCAL

    async def claim(self, owner: str) -> None:
        pass

    async def check_reachable(self) -> None:
        pass

    def staging(self, id: str) -> Path:
        return self._blobs.prepare_folder(_key(id) + ".part")

    async def discard(self, id: str) -> None:
        await asyncio.to_thread(self._blobs.delete, _key(id) + ".part")

    async def upload(self, id: str) -> None:
        pass

    async def publish(self, id: str) -> None:
        # After an error of an earlier attempt it exists already.
        if self._blobs.exists(_key(id) + ".part") or not self._blobs.exists(_key(id)):
            await asyncio.to_thread(self._blobs.publish_folder, _key(id) + ".part", _key(id))

    async def folder(self, id: str) -> Path:
        path = self._blobs.path(_key(id))
        if not path.is_dir():
            raise FileNotFoundError(path)
        return path

    def ref(self, folder: Path) -> BlobRef:
        return blob_ref(folder, {DATA: self._blobs.root})

    def is_at_hand(self, id: str) -> bool:
        return self._blobs.exists(_key(id))

    async def check(self, id: str) -> None:
        await asyncio.to_thread(check_folder, await self.folder(id))

    async def verify(self, id: str) -> bool:
        return await asyncio.to_thread(check_whole, await self.folder(id))

    async def strays(self, recorded: set[str]) -> list[str]:
        return []

    async def files(self, id: str) -> list[StoredFile]:
        return await asyncio.to_thread(list_files, await self.folder(id))

    def link(self, id: str, name: str, life_s: int) -> str | None:
        return None

    async def copy(self, source: str, id: str) -> None:
        await asyncio.to_thread(self._blobs.link_folder, await self.folder(source), _key(id))

    async def delete(self, id: str) -> None:
        await asyncio.to_thread(self._blobs.delete, _key(id))

    async def clear_leftovers(self, recorded: set[str]) -> None:
        for name in list(self._blobs.children("checkpoints")):
            if name not in recorded:
                await asyncio.to_thread(self._blobs.delete, f"checkpoints/{name}")


def _key(id: str) -> str:
    return f"checkpoints/{id}"


def check_whole(folder: Path) -> bool:
    """Check digests, and the structure of safetensors files; False where there are no digests.

    Raises:
        CheckpointDamaged: with the file's name.
    """
    has_digests = check_folder(folder)
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            read_header(path)
        except (BadSafetensors, OSError) as error:
            raise damaged(path, str(error)) from error
    return has_digests


def list_files(folder: Path) -> list[StoredFile]:
    """The files of a checkpoint; their manifest of digests is ours alone."""
    files: list[StoredFile] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE):
        stat = path.stat()
        files.append(StoredFile(str(path.relative_to(folder)), stat.st_size, stat.st_mtime))
    return files
