"""A data directory, its database and its store of checkpoints belong together: what was put apart is refused.

The rows of one with the files of another would be taken for a crash's leftovers, and cleared away.
"""

import fcntl
import logging
import os
from pathlib import Path

import msgspec
from sqlalchemy.engine import URL

from selfloop.storage.blobs.checkpoints import LOCAL, CheckpointStore
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_access, queries_checkpoints
from selfloop.storage.db.address import is_sqlite, shown
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest, Conflict
from selfloop.types.ids import new_id

log = logging.getLogger(__name__)

_FILE = "installation.json"
_LOCK_FILE = "gateway.lock"
DATABASE_FILE = "selfloop.db"
"""Of a data directory whose rows are in no other database."""


class _Parts(msgspec.Struct, frozen=True):
    """``data_dir`` is where the directory lay at the last start; empty before there was one that noted it."""

    id: str
    database: str
    store: str
    data_dir: str = ""


class DataDirIdentity:
    def __init__(self, data_dir: Path) -> None:
        """To be made before the database is: it looks at what an earlier start left."""
        self._path = data_dir / _FILE
        self._data_dir = data_dir
        self._earlier = self._read()

    def _read(self) -> _Parts | None:
        if self._path.exists():
            return msgspec.json.decode(self._path.read_bytes(), type=_Parts)
        if (self._data_dir / DATABASE_FILE).exists():
            # Made before there was another place for either.
            return _Parts(new_id(), DATABASE_FILE, LOCAL)
        return None

    async def check(self, db: Database, store: CheckpointStore) -> None:
        """Remember what the data directory belongs to.

        Raises:
            Conflict: the database is a new one while this directory's rows are in another, or the file that they were
                in before; or checkpoints are recorded that lie in another store; or this is a copy of a directory that
                is still there, and both would keep their checkpoints in one bucket.
        """
        id = new_id() if self._earlier is None else self._earlier.id
        rows = DATABASE_FILE if is_sqlite(db.url) else shown(db.url)
        now = _Parts(id, rows, store.address, str(self._data_dir.resolve()))
        earlier = self._earlier or now
        async with db.read() as session:
            is_new = not await queries_access.teams(session)
            num_checkpoints = await queries_checkpoints.count(session)
        if earlier.database != now.database and (is_new or is_sqlite(db.url)):
            raise Conflict(
                f"{self._data_dir} belongs to the rows in {earlier.database}, not to {now.database}: "
                "start with the database that it had, or choose a new --data-dir"
            )
        if earlier.store != now.store and num_checkpoints:
            raise Conflict(
                f"the {num_checkpoints} checkpoints of this server are in {earlier.store}, not in {now.store}: start "
                "with the --store that it had; docs/deploy.md says how to move them"
            )
        if store.address != LOCAL and (original := self._original()) is not None:
            raise Conflict(
                f"{self._data_dir} is a copy of {original}, and each would clear away the other's checkpoints in "
                f"{store.address}. `selfloop backup` and `selfloop restore` make a copy that goes on beside the "
                "original; where this one is to take its place, delete the original first"
            )
        await store.claim(id)
        if self._earlier != now or not self._path.exists():
            self._remember(now)

    def _original(self) -> Path | None:
        """The directory that this one is a copy of, if that is still there: it was not moved."""
        if self._earlier is None or not self._earlier.data_dir:
            return None
        place = Path(self._earlier.data_dir)
        if not (place / _FILE).is_file() or place.samefile(self._data_dir):
            return None
        theirs = msgspec.json.decode((place / _FILE).read_bytes(), type=_Parts)
        return place if theirs.id == self._earlier.id else None

    def check_parts(self, database: URL, store: str) -> None:
        """Check that what a command was given is what the data directory has; nothing is changed.

        Raises:
            Conflict: it is not, or there is no data directory.
        """
        if self._earlier is None:
            raise Conflict(f"{self._data_dir} is no data directory: it has no {_FILE}")
        rows = DATABASE_FILE if is_sqlite(database) else shown(database)
        for kind, ours, theirs in (("rows", self._earlier.database, rows), ("checkpoints", self._earlier.store, store)):
            if ours != theirs:
                raise Conflict(f"the {kind} of {self._data_dir} are in {ours}, not in {theirs}: name that one")

    def restored(self, store: str, *, is_same: bool) -> None:
        """Of a copy whose rows are in its file; the server that it was made of goes on beside it unless ``is_same``."""
        assert self._earlier is not None
        id = self._earlier.id if is_same else new_id()
        self._remember(_Parts(id, DATABASE_FILE, store))

    @property
    def owner(self) -> str:
        """Tells this data directory from a copy of it: which one it is, and where it lies."""
        assert self._earlier is not None, "checked"
        return f"{self._earlier.id} {self._data_dir.resolve()}"

    def move_to(self, database: URL) -> None:
        """The rows lie in ``database`` from now on."""
        assert self._earlier is not None
        self._remember(msgspec.structs.replace(self._earlier, database=shown(database)))

    def _remember(self, parts: _Parts) -> None:
        LocalBlobs(self._data_dir).put(_FILE, msgspec.json.encode(parts))
        self._earlier = parts


def make_folder(data_dir: Path) -> None:
    """Make the data directory where there is none yet. Raises :class:`BadRequest` for one that we may not write."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except FileExistsError:
        raise BadRequest("--data-dir", f"a folder; {data_dir} is a file") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise BadRequest("--data-dir", f"a folder that can be made; {data_dir}: {error.strerror}") from None
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        raise BadRequest("--data-dir", f"a folder that we may write; {data_dir} is none")


class Hold:
    """Of a data directory: until it is closed, or its process ends, a second one is refused.

    What is locked is the directory itself, so that it stays held whichever of its files are deleted, and wherever it is
    moved. ``gateway.lock`` names the holder, and is locked for servers of earlier versions, which look at nothing else.
    """

    def __init__(self, data_dir: Path) -> None:
        """Raises :class:`Conflict` when another process holds it."""
        file = data_dir / _LOCK_FILE
        self._descriptors: list[int] = []
        try:
            self._take(os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY), data_dir)
            self._take(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), data_dir)
        except BlockingIOError:
            holder = file.read_text().strip() if file.is_file() else ""
            self.close()
            raise Conflict(
                f"another selfloop server (pid {holder or 'unknown'}) is using {data_dir}; stop it or choose another "
                "--data-dir"
            ) from None
        except BaseException:
            self.close()
            raise
        os.ftruncate(self._descriptors[-1], 0)
        os.write(self._descriptors[-1], str(os.getpid()).encode())

    def _take(self, descriptor: int, data_dir: Path) -> None:
        self._descriptors.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            # As some network file systems do; one of the two is enough as long as nobody deletes it.
            log.warning("%s is on a file system that cannot lock everything: %s", data_dir, error)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def hold(data_dir: Path) -> Hold:
    """Hold the data directory; a second gateway on it is refused. Raises :class:`Conflict`."""
    return Hold(data_dir)
