"""Payloads and results of what was accepted: in their row while they are small, else in a file, each with a digest.

Operations and queued samples keep theirs in the same way, and delete them in the same way.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.data_dir.transient_errors import is_passing
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db.database import Database
from selfloop.storage.db.queries_operations import Purged
from selfloop.types.digests import digest_of
from selfloop.types.errors import disk_full

# Below this they lie in their row: one write instead of two.
_INLINE_BYTES = 16 * 1024
_PURGED_AT_ONCE = 500


class StoredBytes(NamedTuple):
    """What a row has of a payload or result: the bytes or the key of their file, and the digest.

    ``digest`` is None in rows of before there were digests.
    """

    inline: bytes | None
    key: str | None
    digest: str | None


class BytesLost(Exception):
    """They are gone, or are not what was stored; the message says which, with the file's name."""


@dataclass(frozen=True, slots=True)
class DurableBytes:
    """Those of one kind, whose files lie at ``<folder>/<owner>/<name>``.

    The ``place`` is what they belong to, in words that no other has. It is part of the digest: what lies under
    another's name is not what was stored here.
    """

    db: Database
    blobs: LocalBlobs
    folder: str

    async def put(self, owner: str, name: str, place: str, content: bytes) -> StoredBytes:
        """Make them durable; those that are small are for the row to hold. Raises :class:`OSError`."""
        digest = digest_of(place.encode(), content)
        if len(content) <= _INLINE_BYTES:
            return StoredBytes(content, None, digest)
        key = f"{self.folder}/{owner}/{name}"
        await asyncio.to_thread(self.blobs.put, key, content)
        return StoredBytes(None, key, digest)

    async def put_anyhow(self, owner: str, name: str, place: str, content: bytes) -> StoredBytes:
        """As :meth:`put`; a disk may be out of files and not of bytes: then the row holds them, however large."""
        try:
            return await self.put(owner, name, place, content)
        except OSError as error:
            if disk_full(error) is None:
                raise
            return StoredBytes(content, None, digest_of(place.encode(), content))

    async def get(self, stored: StoredBytes, place: str) -> bytes:
        """What was stored, bit for bit. Raises :class:`BytesLost`, and :class:`OSError` for what may pass."""
        content = await read(self.blobs, stored)
        if not is_intact(stored, place, content):
            raise BytesLost(f"{stored.key or 'its row'} is damaged: that is not what was stored")
        return content

    async def delete(self, keys: Iterable[str | None]) -> None:
        for key in keys:
            if key is not None:
                await asyncio.to_thread(self.blobs.delete, key)

    async def clear_leftovers(self, keys_of: Callable[[AsyncSession, str], Awaitable[set[str]]]) -> None:
        """Remove files that a crash left without a row; ``keys_of`` an owner are those that rows know."""
        for owner in list(self.blobs.children(self.folder)):
            names = list(self.blobs.children(f"{self.folder}/{owner}"))
            async with self.db.read() as session:
                known = await keys_of(session, owner) if names else set[str]()
            await self.delete(key for name in names if (key := f"{self.folder}/{owner}/{name}") not in known)

    async def purge(self, purge_some: Callable[[AsyncSession, float, int], Awaitable[Purged]], before: float) -> None:
        """Delete what was finished ``before``.

        A few at a time: however many there are, nobody else waits long for its turn to write.
        """
        while True:
            async with self.db.write() as session:
                purged = await purge_some(session, before, _PURGED_AT_ONCE)
            await self.delete(purged.blob_keys)
            if purged.num_rows < _PURGED_AT_ONCE:
                return


async def read(blobs: LocalBlobs, stored: StoredBytes) -> bytes:
    """What lies there now. Raises :class:`BytesLost` where it is gone, and :class:`OSError` for what may pass."""
    if stored.key is None:
        if stored.inline is None:
            raise BytesLost("its row has lost it")
        return stored.inline
    try:
        return await asyncio.to_thread(blobs.get, stored.key)
    except OSError as error:
        if is_passing(error):
            raise
        gone = isinstance(error, FileNotFoundError)
        how = "is gone" if gone else f"cannot be read: {error.strerror}"
        raise BytesLost(f"{stored.key} {how}") from error


def is_intact(stored: StoredBytes, place: str, content: bytes) -> bool:
    """Whether ``content`` is what was stored; of what has no digest nobody knows, and it counts as intact."""
    return stored.digest in (None, digest_of(place.encode(), content))
