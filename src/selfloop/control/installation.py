"""A data directory, its database and its store of checkpoints belong together: what was put apart is refused.

The rows of one with the files of another would be taken for a crash's leftovers, and cleared away.
"""

from pathlib import Path

import msgspec

from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_access, queries_checkpoints
from selfloop.storage.db.address import is_sqlite, shown
from selfloop.storage.db.database import Database
from selfloop.types.errors import Conflict
from selfloop.types.ids import new_id

_FILE = "installation.json"
_SQLITE_FILE = "selfloop.db"


class _Parts(msgspec.Struct, frozen=True):
    id: str
    database: str
    store: str


class Installation:
    def __init__(self, data_dir: Path) -> None:
        """To be made before the database is: it looks at what an earlier start left."""
        self._path = data_dir / _FILE
        self._data_dir = data_dir
        self._earlier = self._read()

    def _read(self) -> _Parts | None:
        if self._path.exists():
            return msgspec.json.decode(self._path.read_bytes(), type=_Parts)
        if (self._data_dir / _SQLITE_FILE).exists():
            # Made before there was another place for either.
            return _Parts(new_id(), _SQLITE_FILE, "local")
        return None

    async def check(self, db: Database, store: CheckpointStore) -> None:
        """Remember what the data directory belongs to.

        Raises:
            Conflict: the database is a new one while this directory's rows are in another, or checkpoints are
                recorded that lie in another store.
        """
        id = new_id() if self._earlier is None else self._earlier.id
        now = _Parts(id, _SQLITE_FILE if is_sqlite(db.url) else shown(db.url), store.address)
        earlier = self._earlier or now
        async with db.read() as session:
            is_new = not await queries_access.teams(session)
            num_checkpoints = len(await queries_checkpoints.all_ids(session))
        if earlier.database != now.database and is_new:
            raise Conflict(
                f"{self._data_dir} belongs to the rows in {earlier.database}, and {now.database} has none: "
                "start with the database that it had, or choose a new --data-dir"
            )
        if earlier.store != now.store and num_checkpoints:
            raise Conflict(
                f"the {num_checkpoints} checkpoints of this server are in {earlier.store}, not in {now.store}: start "
                "with the --store that it had; docs/deploy.md tells how to move them"
            )
        await store.claim(id)
        if self._earlier != now or not self._path.exists():
            LocalBlobs(self._data_dir).put(_FILE, msgspec.json.encode(now))
            self._earlier = now
