"""Encrypts a folder's files with age (https://age-encryption.org/v1), for those who will download them."""

import os
from pathlib import Path
from typing import Any

import pyrage

from selfloop.types.digests import MANIFEST_FILE, seal

# The extension module comes without types.
_age: Any = pyrage
SUFFIX = ".age"


def encrypt_folder(folder: Path, recipients: list[str]) -> int:
    """Replace every file by its encrypted form, named ``<file>.age``; returns the bytes written.

    Any of the ``recipients`` (``age1...``) opens each. All is on disk when this returns.
    """
    keys = [_age.x25519.Recipient.from_str(recipient) for recipient in recipients]
    size_bytes = 0
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for plain in sorted(path for path in folder.rglob("*") if path.is_file()):
        encrypted = plain.with_name(plain.name + SUFFIX)
        _age.encrypt_file(str(plain), str(encrypted), keys)
        _sync(encrypted)
        size_bytes += encrypted.stat().st_size
        plain.unlink()
    seal(folder)
    _sync(folder)
    return size_bytes


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
