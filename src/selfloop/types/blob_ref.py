"""Names of stored files and folders that mean the same to every process, on this machine or on another."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import msgspec

DATA = "data"
"""The root of what the server stores: its data directory."""


class BlobRef(msgspec.Struct, frozen=True):
    """A stored file or folder. What a folder of ours holds is guarded by the digests that lie in it.

    Args:
        root: the name of a store that both sides know, as :data:`DATA`, or the URL of one: ``file:///models``.
        key: relative to the root, with slashes.
    """

    root: str
    key: str


def blob_ref(path: Path, roots: Mapping[str, Path]) -> BlobRef:
    """The reference of a local path: by the first of ``roots`` that contains it, else by a ``file:`` URL."""
    path = path.absolute()
    for name, root in roots.items():
        if path.is_relative_to(root.absolute()):
            return BlobRef(name, path.relative_to(root.absolute()).as_posix())
    return BlobRef(path.parent.as_uri(), path.name)


def local_path(ref: BlobRef, roots: Mapping[str, Path]) -> Path:
    """Where a reference leads on this machine.

    Raises:
        ValueError: the root is not known here, or the key leads out of it.
    """
    if ref.root in roots:
        root = roots[ref.root]
    elif (url := urlsplit(ref.root)).scheme == "file" and not url.netloc:
        root = Path(unquote(url.path))
    else:
        raise ValueError(f"a blob of the store {ref.root!r}, and known here are only {sorted(roots)} and file URLs")
    key = PurePosixPath(ref.key)
    if key.is_absolute() or ".." in key.parts:
        raise ValueError(f"not below the root of blobs: {ref.key!r}")
    return root / key
