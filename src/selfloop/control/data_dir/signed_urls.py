"""Links to files that need no key: each for one file, for an hour, signed with the secret of the installation."""

import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path
from typing import Literal, NamedTuple

from selfloop.types.errors import Denied

LINK_LIFE_S = 3600
SECRET_FILE = "link_secret"
_SECRET_BYTES = 32

Kind = Literal["checkpoint", "debug", "upload"]


class Signed(NamedTuple):
    """``expires`` in UNIX seconds."""

    expires: int
    signature: str


class SignedUrls:
    """Signs and checks links with the secret in the data directory, which another process may rotate at any time."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / SECRET_FILE
        self._seen = (0, 0)
        self._secret = b""
        if not self._path.exists():
            rotate(data_dir)

    def sign(self, kind: Kind, id: str, name: str) -> Signed:
        """A link to the file ``name`` of ``id``, from now on."""
        expires = int(time.time()) + LINK_LIFE_S
        return Signed(expires, self._signature(kind, id, name, expires))

    def check(self, kind: Kind, id: str, name: str, expires: int, signature: str) -> None:
        """Raises :class:`Denied` for a link that was never given out so, or has expired, or is of an older secret."""
        if not hmac.compare_digest(self._signature(kind, id, name, expires).encode(), signature.encode()):
            raise Denied("this link is not valid")
        if expires < time.time():
            raise Denied("this link has expired; list the files again for a new one")

    def _signature(self, kind: Kind, id: str, name: str, expires: int) -> str:
        signed = json.dumps([kind, id, name, expires]).encode()
        return hmac.new(self._current(), signed, hashlib.sha256).hexdigest()

    def _current(self) -> bytes:
        stat = self._path.stat()
        # A rotated secret is another file, whatever the clock says.
        seen = (stat.st_ino, stat.st_mtime_ns)
        if seen != self._seen:
            self._secret, self._seen = self._path.read_bytes(), seen
        return self._secret


def rotate(data_dir: Path) -> None:
    """Make a new secret, readable by the owner only; links of an older one are refused from now on."""
    path = data_dir / SECRET_FILE
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
