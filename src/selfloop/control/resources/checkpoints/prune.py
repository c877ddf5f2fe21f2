"""Pruning: rows of what ended long ago, with what lies on the disk for them, looked at first and archived if asked."""

import asyncio
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import zstandard
from sqlalchemy import ColumnElement, Connection

from selfloop.control.observe.logs import LOG_FILE
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_prune as queries
from selfloop.storage.db import tables
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest

log = logging.getLogger(__name__)

MIN_AGE_S = 86_400.0
"""Results and idempotency keys are kept for an hour; a day is well beyond what any client still asks for."""

# Few enough that nobody who writes waits long for its turn.
_IDS_AT_ONCE = 50
_KEYS_AT_ONCE = 500

OnPart = Callable[[str, float], None]


@dataclass(slots=True)
class Kind:
    """How much of one kind goes: rows and files, and their bytes (of rows: as the archive has them)."""

    num: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class Pruned:
    """What went, or would go, by kind."""

    kinds: dict[str, Kind] = field(default_factory=dict[str, Kind])

    def add(self, kind: str, size_bytes: int) -> None:
        known = self.kinds.setdefault(kind, Kind())
        known.num += 1
        known.size_bytes += size_bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    """What goes in one transaction.

    Args:
        where: still true of ``ids`` when it comes to it, or they stay.
        blobs: keys of folders that go with them.
    """

    table: type[tables.Base]
    ids: Sequence[Any]
    where: ColumnElement[bool] | None
    steps: Callable[[Sequence[Any]], list[queries.Step]]
    blobs: Callable[[Any], list[str]] = lambda _id: []


class Archive:
    """JSON lines in one zstd stream: a row is ``{"table", "row"}``, a file ``{"file", "data"}`` (bytes in base64)."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`BadRequest` where there is a file already, and :class:`OSError`."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise BadRequest("--archive", f"a file that is not there yet: {path} is") from None
        self._file: BinaryIO = os.fdopen(descriptor, "wb")
        self._stream = zstandard.ZstdCompressor(level=6).stream_writer(self._file, closefd=False)

    def write(self, line: bytes) -> None:
        self._stream.write(line + b"\n")

    def sync(self) -> None:
        """Put what was written on the disk, before it goes elsewhere."""
        self._stream.flush(zstandard.FLUSH_BLOCK)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_archive(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of an archive, also of one that was broken off."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8"):
            yield msgspec.json.decode(line)


class Prune:
    """Works beside a running server: each piece is a transaction of its own, in which it is looked at once more."""

    def __init__(self, db: Database, data_dir: Path) -> None:
        self._db = db
        self._data_dir = data_dir
        self._blobs = LocalBlobs(data_dir)

    async def run(self, older_than_s: float, *, archive: Path | None, dry_run: bool, on_part: OnPart) -> Pruned:
        """Remove what ended at least ``older_than_s`` ago, or only report what would go.

        Raises:
            BadRequest: too young, or the archive is there already.
            OSError: the archive cannot be written; what is not in it stays.
        """
        if older_than_s < MIN_AGE_S:
            raise BadRequest("--older-than", "1d or more")
        before = time.time() - older_than_s
        file = None if archive is None or dry_run else await asyncio.to_thread(Archive, archive)
        try:
            return await asyncio.to_thread(self._run, before, file, dry_run, on_part)
        finally:
            if file is not None:
                await asyncio.to_thread(file.close)

    def _run(self, before: float, archive: Archive | None, dry_run: bool, on_part: OnPart) -> Pruned:
        pruned = Pruned()
        pieces = self._db.reading(lambda connection: _pieces(connection, before))
        for number, piece in enumerate(pieces):
            on_part(piece.table.__tablename__, number / len(pieces))
            if dry_run:
                self._db.reading(lambda connection, piece=piece: self._look(connection, piece, pruned, None))
            else:
                self._remove(piece, pruned, archive)
        self._prune_logs(before, pruned, archive, dry_run)
        return pruned

    def _remove(self, piece: _Piece, pruned: Pruned, archive: Archive | None) -> None:
        counted = Pruned()

        def work(connection: Connection) -> list[str]:
            counted.kinds.clear()  # It may be asked twice, the first time undone.
            still = piece
            if piece.where is not None:
                there = set(queries.ids(connection, piece.table, piece.where & _named(piece)))
                still = _Piece(piece.table, [i for i in piece.ids if i in there], None, piece.steps, piece.blobs)
            keys = self._look(connection, still, counted, archive)
            if archive is not None:
                archive.sync()
            for step in still.steps(still.ids):
                queries.remove(connection, step)
            return keys

        for key in self._db.in_transaction(work):
            self._blobs.delete(key)
        for name, kind in counted.kinds.items():
            known = pruned.kinds.setdefault(name, Kind())
            known.num += kind.num
            known.size_bytes += kind.size_bytes

    def _look(self, connection: Connection, piece: _Piece, pruned: Pruned, archive: Archive | None) -> list[str]:
        """Count (and archive) the rows and files of a piece; returns the keys of its files and folders."""
        keys = {key for id in piece.ids for key in piece.blobs(id)}
        own = tuple(keys)
        for step in piece.steps(piece.ids):
            name = step.table.__tablename__
            for row in queries.read(connection, step):
                line = msgspec.json.encode({"table": name, "row": row})
                pruned.add(name, len(line))
                if archive is not None:
                    archive.write(line)
                # Of a run they lie in its folder.
                stored = {key for column in ("payload_key", "result_key") if (key := row.get(column)) is not None}
                keys |= {key for key in stored if not key.startswith(own)}
        for key in sorted(keys):
            for path in _files(self._blobs.path(key)):
                self._count_file(path, "files", pruned, archive)
        return sorted(keys)

    def _count_file(self, path: Path, kind: str, pruned: Pruned, archive: Archive | None) -> None:
        pruned.add(kind, path.stat().st_size)
        if archive is not None:
            name = str(path.relative_to(self._data_dir))
            archive.write(msgspec.json.encode({"file": name, "data": path.read_bytes()}))

    def _prune_logs(self, before: float, pruned: Pruned, archive: Archive | None, dry_run: bool) -> None:
        """Rotated log files, and the output of workers that wrote nothing since."""
        folder = self._data_dir / "logs"
        old = [*folder.glob(f"{LOG_FILE}.*"), *folder.glob("worker-*.log")] if folder.is_dir() else []
        for path in sorted(old):
            if path.stat().st_mtime < before:
                self._count_file(path, "log files", pruned, archive)
                if not dry_run:
                    if archive is not None:
                        archive.sync()
                    path.unlink()


def _pieces(connection: Connection, before: float) -> list[_Piece]:
    """In the order in which they may go: nothing before what names it."""
    run_ids = queries.ids(connection, tables.RunRow, queries.runs(before))
    sampler_ids = queries.ids(connection, tables.SamplerRow, queries.samplers(before))
    gone_runs, gone_samplers = set(run_ids), {*sampler_ids, *queries.samplers_of(connection, run_ids)}
    pieces = [
        _Piece(tables.RunRow, some, queries.runs(before), queries.steps_of_runs, _run_blobs)
        for some in _chunks(run_ids, _IDS_AT_ONCE)
    ]
    pieces += [
        _Piece(tables.SamplerRow, some, queries.samplers(before), queries.steps_of_samplers)
        for some in _chunks(sampler_ids, _IDS_AT_ONCE)
    ]
    for left in queries.emptied(before):
        ids = queries.ids(connection, left.table, left.old)
        for holder in left.holders:
            gone = gone_runs if holder.table is tables.RunRow else gone_samplers
            holding = queries.owners(connection, holder)
            ids = [id for id in ids if holding.get(id, set()) <= gone]
        pieces += [_Piece(left.table, some, left.where, left.steps) for some in _chunks(ids, _KEYS_AT_ONCE)]
    for table, where, position in (
        (tables.OperationRow, queries.operations(before), gone_runs),
        (tables.QueuedSampleRow, queries.samples(before), gone_samplers),
    ):
        keys = [key for key in queries.keyed(connection, table, where) if key[0] not in position]
        pieces += [_Piece(table, some, None, queries.steps_of_keys(table)) for some in _chunks(keys, _KEYS_AT_ONCE)]
    return pieces


def _run_blobs(id: str) -> list[str]:
    return [f"journal/{id}", f"snapshots/{id}", f"initial/{id}"]


def _named(piece: _Piece) -> ColumnElement[bool]:
    return piece.table.__table__.c["id"].in_(list(piece.ids))


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
