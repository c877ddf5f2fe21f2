"""Digests of the bytes that we write, so that a bit which changed on the disk is noticed before it is used.

A folder of ours has a manifest: the size and the XXH3-128 digest of each file, and a digest of these lines themselves.
It guards against accidents (a bad disk, cable or memory), not against somebody who may write to the data directory.
"""

import mmap
import os
from pathlib import Path

import msgspec
import xxhash

from selfloop.types.errors import CheckpointDamaged

MANIFEST_FILE = "selfloop.digests"


class FileDigest(msgspec.Struct, frozen=True):
    """A file: its path relative to the folder, its size, and the hex digest of its content."""

    name: str
    size_bytes: int
    digest: str


_manifest_decoder = msgspec.json.Decoder(list[FileDigest])


def digest_of(*parts: bytes) -> str:
    """Hex XXH3-128 of the parts, one behind the other."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def file_digest(path: Path, name: str) -> FileDigest:
    """Of the file at ``path``, to be called ``name``. Raises :class:`OSError`."""
    with open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes == 0:
            return FileDigest(name, 0, digest_of())
        # Nothing is copied, and the lock on the interpreter is free meanwhile.
        with mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ) as content:
            content.madvise(mmap.MADV_SEQUENTIAL)
            return FileDigest(name, size_bytes, xxhash.xxh3_128_hexdigest(content))


def seal(folder: Path) -> None:
    """Write the manifest of all files in ``folder``, durably; links lead to what is not ours. Raises OSError."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    names = sorted(str(path.relative_to(folder)) for path in files)
    lines = msgspec.json.encode([file_digest(folder / name, name) for name in names if name != MANIFEST_FILE])
    with open(folder / MANIFEST_FILE, "wb") as file:
        file.write(lines + b"\n" + digest_of(lines).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, FileDigest] | None:
    """The digests of ``folder`` by file name; None where none were written.

    Raises:
        CheckpointDamaged: the manifest is not what was written, or no manifest of this folder.
    """
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    lines, _, own = content.removesuffix(b"\n").rpartition(b"\n")
    if not content.endswith(b"\n") or own != digest_of(lines).encode():
        raise damaged(path, "it is not what was written")
    try:
        entries = _manifest_decoder.decode(lines)
    except msgspec.MsgspecError as error:
        raise damaged(path, f"it is no manifest ({error})") from error
    for entry in entries:
        # A folder may come from somebody else, with a manifest that names files outside of it.
        if not entry.name or ".." in Path(entry.name).parts or Path(entry.name).is_absolute() or "\0" in entry.name:
            raise damaged(path, "it names a file outside of its folder")
    return {entry.name: entry for entry in entries}


def check_file(folder: Path, name: str) -> bool:
    """Check one file of ``folder``; False where it has no digest. Raises :class:`CheckpointDamaged`."""
    known = read_manifest(folder)
    if known is None or name not in known:
        return False
    _compare(folder, known[name])
    return True


def check_folder(folder: Path) -> bool:
    """Check every file that the manifest of ``folder`` names; False where there is no manifest.

    Raises:
        CheckpointDamaged: a file is missing, cannot be read, or is not what was written; the error names it.
    """
    known = read_manifest(folder)
    for entry in (known or {}).values():
        _compare(folder, entry)
    return known is not None


def damaged(path: Path, how: str) -> CheckpointDamaged:
    """The error about a file or folder; it is named as, e.g., ``checkpoints/<id>/adapter_model.safetensors``."""
    return CheckpointDamaged(f"{'/'.join(path.parts[-3:])} is damaged: {how}. Nothing of it was used")


def _compare(folder: Path, entry: FileDigest) -> None:
    path = folder / entry.name
    try:
        found = file_digest(path, entry.name)
    except FileNotFoundError:
        raise damaged(path, "it is gone") from None
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    if found.size_bytes != entry.size_bytes:
        raise damaged(path, f"it has {found.size_bytes:,} bytes, {entry.size_bytes:,} were written")
    if found.digest != entry.digest:
        raise damaged(path, "its bytes are not those that were written")
