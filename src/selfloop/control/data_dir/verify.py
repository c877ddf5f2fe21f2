"""Is everything in a data directory (and its bucket) what was written? Reads only; may run beside a server."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

from selfloop.control.data_dir.transient_errors import in_words
from selfloop.control.queue.durable_bytes import BytesLost, StoredBytes, is_intact, read
from selfloop.control.queue.journal import payload_place, result_place
from selfloop.control.queue.recovery import identity
from selfloop.control.resources.checkpoints.pinned import pinned_key
from selfloop.control.sampling.queued_samples import sample_place
from selfloop.control.sampling.recorded import routes_place
from selfloop.storage.blobs.checkpoints import CheckpointStore, check_whole
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_resources, queries_verify
from selfloop.storage.db.address import is_sqlite
from selfloop.storage.db.database import Database
from selfloop.types.errors import SelfloopError
from selfloop.types.status import RunStatus

Verdict = Literal["sound", "no digest", "damaged", "missing", "unknown"]

# Where everything is known to a row; what a server has not recorded yet ends so, or is younger than the look.
_FOLDERS = ("checkpoints", "snapshots", "initial", "held")
_FILES = ("journal", "samples", "recorded")
_UNFINISHED = (".part", ".partial", ".lock")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that is not as it was written; ``what`` is its name below the data directory, or the row."""

    verdict: Verdict
    what: str
    how: str


@dataclass(slots=True)
class Report:
    """What was found: how many of each kind are sound, and everything that is not."""

    counts: Counter[tuple[str, Verdict]] = field(default_factory=Counter[tuple[str, Verdict]])
    troubles: list[Trouble] = field(default_factory=list[Trouble])

    def note(self, kind: str, verdict: Verdict, what: str = "", how: str = "") -> None:
        self.counts[kind, verdict] += 1
        if verdict in ("damaged", "missing", "unknown"):
            self.troubles.append(Trouble(verdict, what, how))

    @property
    def is_sound(self) -> bool:
        """Nothing is damaged or missing; what no row knows, and what has no digest, harms nobody."""
        return all(trouble.verdict == "unknown" for trouble in self.troubles)


class Verification:
    """One look at everything."""

    def __init__(self, data_dir: Path, db: Database, store: CheckpointStore) -> None:
        self._data_dir = data_dir
        self._blobs = LocalBlobs(data_dir)
        self._db = db
        self._store = store
        self._known: set[str] = set()
        self.report = Report()

    async def run(self) -> Report:
        """Look at the database, then at each row's bytes and files, last for files without a row."""
        present = await asyncio.to_thread(lambda: set(self._present()))
        try:
            if is_sqlite(self._db.url):
                await self._database_file()
            await self._runs()
            await self._operations()
            await self._samples()
            await self._recorded()
            await self._checkpoints()
            await self._models()
        except SQLAlchemyError as error:
            self.report.note("database", "damaged", "database", in_words(error))
            return self.report
        # What was there before the rows were read, and no row knows now.
        for key in sorted(present - self._known):
            if self._blobs.exists(key):
                self.report.note("files", "unknown", key, "no row knows it; the next start of a server removes it")
        return self.report

    async def _database_file(self) -> None:
        found = await asyncio.to_thread(queries_verify.complaints, Path(str(self._db.url.database)))
        if not found:
            self.report.note("database", "sound")
        for line in found:
            self.report.note("database", "damaged", "database", line)

    def _present(self) -> Iterable[str]:
        for root in _FOLDERS:
            depth = 2 if root in ("snapshots", "held") else 1
            yield from (key for key in self._below(root, depth))
        for root in _FILES:
            yield from self._below(root, 2)

    def _below(self, root: str, depth: int) -> Iterable[str]:
        pattern = "/".join("*" * depth)
        for path in (self._data_dir / root).glob(pattern):
            if not path.name.endswith(_UNFINISHED):
                yield str(path.relative_to(self._data_dir))

    async def _runs(self) -> None:
        async with self._db.read() as session:
            rows = await queries_resources.runs(session)
        for run in rows:
            name = f"run {run.id}"
            if run.digest is None:
                self.report.note("runs", "no digest")
            elif run.digest == identity(run):
                self.report.note("runs", "sound")
            else:
                self.report.note("runs", "damaged", name, "its row is not what was written")
            if run.status == RunStatus.ACTIVE:
                for key in (run.snapshot_key, run.older_key, run.initial_key):
                    if key is not None:
                        await self._folder("snapshots", key)

    async def _operations(self) -> None:
        last = None
        while True:
            async with self._db.read() as session:
                rows = await queries_verify.operations(session, last)
            for row in rows:
                what = f"{row.kind} (seq_id {row.seq}) of run {row.run_id}"
                payload = StoredBytes(row.payload, row.payload_key, row.payload_digest)
                result = StoredBytes(row.result, row.result_key, row.result_digest)
                await self._bytes("payloads", what, payload, payload_place(row))
                await self._bytes("results", what, result, result_place(row))
            if not rows:
                return
            last = rows[-1]

    async def _samples(self) -> None:
        last = None
        while True:
            async with self._db.read() as session:
                rows = await queries_verify.samples(session, last)
            for row in rows:
                what = f"sample {row.id} of sampler {row.sampler_id}"
                for stored in (
                    StoredBytes(row.payload, row.payload_key, row.payload_digest),
                    StoredBytes(row.result, row.result_key, row.result_digest),
                ):
                    await self._bytes("samples", what, stored, sample_place(row.sampler_id, row.id))
            if not rows:
                return
            last = rows[-1]

    async def _recorded(self) -> None:
        last = None
        while True:
            async with self._db.read() as session:
                rows = await queries_verify.recorded(session, last)
            for row in rows:
                what = f"routes of request {row.request} of sampler {row.sampler_id}"
                stored = StoredBytes(row.routes, row.routes_key, row.routes_digest)
                await self._bytes("routes", what, stored, routes_place(row.sampler_id, row.request))
            if not rows:
                return
            last = rows[-1]

    async def _bytes(self, kind: str, what: str, stored: StoredBytes, place: str) -> None:
        """What a row keeps in itself or in a file."""
        if stored.inline is None and stored.key is None:
            return
        if stored.key is not None:
            self._known.add(stored.key)
        try:
            content = await read(self._blobs, stored)
        except BytesLost as error:
            self.report.note(kind, "missing", what, str(error))
            return
        if stored.digest is None:
            self.report.note(kind, "no digest")
        elif is_intact(stored, place, content):
            self.report.note(kind, "sound")
        else:
            where = stored.key or "its row"
            self.report.note(kind, "damaged", what, f"{where} is not what was written")

    async def _checkpoints(self) -> None:
        async with self._db.read() as session:
            ids = await queries_verify.checkpoint_ids(session)
            held = await queries_verify.held(session)
        for id in ids:
            self._known.add(f"checkpoints/{id}")
            await self._checkpoint(id)
        for row in held:
            await self._folder("held checkpoints", pinned_key(row.sampler_id, row.checkpoint_id))
        for name in await self._store.strays(set(ids)):
            self.report.note("files", "unknown", name, "no row knows it")

    async def _checkpoint(self, id: str) -> None:
        try:
            has_digests = await self._store.verify(id)
        except FileNotFoundError:
            self.report.note("checkpoints", "missing", f"checkpoints/{id}", "its files are gone")
        except SelfloopError as error:
            self.report.note("checkpoints", "damaged", f"checkpoints/{id}", str(error))
        else:
            self.report.note("checkpoints", "sound" if has_digests else "no digest")

    async def _models(self) -> None:
        """Those that we wrote; a folder that was added is its owner's."""
        async with self._db.read() as session:
            rows = await queries_verify.models(session)
        for row in rows:
            path = None if row.path is None else self._data_dir / row.path
            if path is None or row.source == "folder" or not path.is_relative_to(self._data_dir):
                continue
            await self._folder("models", str(path.relative_to(self._data_dir)))

    async def _folder(self, kind: str, key: str) -> None:
        self._known.add(key)
        path = self._blobs.path(key)
        if not path.is_dir():
            self.report.note(kind, "missing", key, "the folder is gone")
            return
        try:
            has_digests = await asyncio.to_thread(check_whole, path)
        except SelfloopError as error:
            self.report.note(kind, "damaged", key, str(error))
        else:
            self.report.note(kind, "sound" if has_digests else "no digest")
