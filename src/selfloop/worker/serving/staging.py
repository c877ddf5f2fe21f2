"""Between the references of the protocol and the folders that the engine reads and writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from selfloop.types.blob_ref import BlobRef, local_path


class Staging(Protocol):
    """Where a worker's files lie while it works with them. On a machine of its own it downloads and uploads them."""

    def to_read(self, ref: BlobRef) -> Path:
        """A folder with the files of ``ref``. Raises what the engine raises of a folder that is not there."""
        ...

    def to_write(self, ref: BlobRef) -> Path:
        """Where to create the folder that is to become ``ref``."""
        ...

    def written(self, ref: BlobRef) -> None:
        """The folder is whole and synced. When this returns, the reader of ``ref`` finds it; from any thread."""
        ...


class SharedDisk:
    """The gateway's own disk: files are read where they lie, and written where they stay.

    Args:
        roots: where the roots of references lie on this machine.
    """

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self._roots = roots

    def to_read(self, ref: BlobRef) -> Path:
        return local_path(ref, self._roots)

    def to_write(self, ref: BlobRef) -> Path:
        return local_path(ref, self._roots)

    def written(self, ref: BlobRef) -> None:
        pass
