"""A consistent copy of a data directory while its server goes on, and a data directory made of such a copy.

Files of ours are written once and appear before a row names them; they go after their row has. So a copy of all rows at
one moment, and of the files that these rows name, is what a server that is killed at that moment would leave.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection
from sqlalchemy.engine import URL

import selfloop
from selfloop.control.data_dir.identity import DATABASE_FILE, DataDirIdentity
from selfloop.control.data_dir.migrate_database import move_rows
from selfloop.control.resources.checkpoints import pinned
from selfloop.storage.blobs.checkpoints import LOCAL
from selfloop.storage.blobs.local import sync_directory
from selfloop.storage.db import frozen, migrate
from selfloop.types.digests import MANIFEST_FILE, check_folder, seal
from selfloop.types.errors import BadRequest, CheckpointDamaged, Conflict

log = logging.getLogger(__name__)

_FACTS_FILE = "backup.json"
_STAGING = "backup.part"
# Beside what rows name. Each may be missing.
_SMALL_FILES = ("api_key", "link_secret", "keys_revoked", "open_samples")
_LOGS = "logs"
# A file that a fresh state of the rows still names, so often in a row, is lost rather than just deleted.
_MAX_LOOKS = 3

OnStage = Callable[[str, float], None]


class Facts(msgspec.Struct, frozen=True):
    """What a backup says of itself.

    Args:
        made_at: UNIX seconds.
        store: address of the bucket that its checkpoints are in; ``local`` for those in the backup.
        models_outside: folders by model name that are not in it, as they are not ours.
        missing: files that rows name and that were gone already.
    """

    version: str
    made_at: float
    data_dir: str
    store: str
    models_outside: dict[str, str]
    missing: list[str]


class Backup(NamedTuple):
    """What was made, and what is wrong with what it was made of."""

    facts: Facts
    num_files: int
    size_bytes: int
    damaged: list[str]


def make_backup(data_dir: Path, database: URL, store: str, target: Path, on_stage: OnStage) -> Backup:
    """Copy the data directory to ``target``, which appears once everything in it is there and checked.

    Files are linked where ``target`` is on the same file system, else copied.

    Raises:
        BadRequest: ``target`` is there already, or lies in the data directory.
        Conflict: another backup is under way, the database has another version's schema, or it or the store are not
            those of this data directory.
    """
    DataDirIdentity(data_dir).check_parts(database, store)
    _check_target(target, "DIR")
    if target.resolve().is_relative_to(data_dir.resolve()):
        raise BadRequest("DIR", f"a folder outside of the data directory {data_dir}")
    if (schema := migrate.schema_of(database)) != "current":
        raise Conflict(f"the database has {schema} schema: start this version's server on it first")
    with ExitStack() as stack:
        staging = stack.enter_context(_Staging(data_dir))
        facts = _stage(data_dir, database, store, staging.folder, on_stage)
        damaged = list(_damaged(staging.folder))
        on_stage("digests", 0.5)
        seal(staging.folder)
        on_stage("copying", 0.7)
        _publish(staging.folder, target)
    files = [path for path in target.rglob("*") if path.is_file()]
    return Backup(facts, len(files), sum(path.stat().st_size for path in files), damaged)


def check_backup(folder: Path) -> Facts:
    """Check every byte of a backup, and that every file is there which its rows name.

    Raises:
        BadRequest: it is no backup.
        CheckpointDamaged, frozen.Damaged: it is not what was written; the file is named.
    """
    if not (folder / _FACTS_FILE).is_file() or not (folder / MANIFEST_FILE).is_file():
        raise BadRequest("DIR", f"a folder that `selfloop backup` made; {folder} is none")
    check_folder(folder)
    facts = msgspec.json.decode((folder / _FACTS_FILE).read_bytes(), type=Facts)
    frozen.check_file(folder / DATABASE_FILE)
    return facts


async def restore(
    folder: Path,
    data_dir: Path,
    on_stage: OnStage,
    *,
    database: str | None = None,
    store: str | None = None,
    take_over: bool = False,
) -> Facts:
    """Make a data directory of a backup, which stays as it is.

    Args:
        database: of PostgreSQL, to have the rows there.
        store: address of the bucket in which the checkpoints are now.
        take_over: the server that was backed up is gone, and this one is it from now on.

    Raises:
        BadRequest: ``folder`` is no backup; the data directory is there already.
        Conflict: the checkpoints are in a bucket that is another server's.
        CheckpointDamaged, frozen.Damaged: the backup is not what was written.
    """
    _check_target(data_dir, "--data-dir")
    on_stage("checking the backup", 0.0)
    facts = check_backup(folder)
    address = facts.store if store is None else store
    if (facts.store == LOCAL) != (address == LOCAL):
        raise Conflict(f"the checkpoints of this backup are in {facts.store}: that is where it can be restored")
    if facts.store != LOCAL and facts.store == address and not take_over:
        raise Conflict(
            f"the checkpoints are in {facts.store}, which belongs to the server that was backed up. Where that is gone "
            "for good, say --take-over; else copy them below another prefix (docs/deploy.md) and name it with --store"
        )
    part = Path(tempfile.mkdtemp(prefix=f"{data_dir.name}.part-", dir=_parent(data_dir)))
    try:
        on_stage("copying", 0.3)
        _copy_tree(folder, part)
        on_stage("checking the copy", 0.7)
        check_folder(part)
        for name in (MANIFEST_FILE, _FACTS_FILE):
            (part / name).unlink()
        DataDirIdentity(part).restored(address, is_same=take_over)
        _rename(part, data_dir, "--data-dir")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if database is not None:
        moved = await move_rows(data_dir, database, on_stage)
        moved.left.unlink()
    return facts


class _Staging:
    """A folder on the data directory's file system, for one backup at a time. What a crash left of it is removed."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / _STAGING / "files"
        self._root = data_dir / _STAGING

    def __enter__(self) -> "_Staging":
        self._root.mkdir(mode=0o700, exist_ok=True)
        self._lock = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Conflict(f"another backup of {self._root.parent} is being made") from None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        return self

    def __exit__(self, *_error: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._lock)


def clear_leftovers(data_dir: Path) -> None:
    """Remove what a backup that was killed has left: it keeps files that are deleted from being gone."""
    if (data_dir / _STAGING).is_dir():
        try:
            with _Staging(data_dir):
                pass
        except Conflict:
            pass  # One is being made.


def _stage(data_dir: Path, database: URL, store: str, staging: Path, on_stage: OnStage) -> Facts:
    """Gather the files and rows of one moment."""
    missing: set[str] = set()
    # Most of it ahead, so that what is left to be done at one moment is little.
    with frozen.frozen(database) as connection:
        on_stage("files", 0.0)
        _link_all(data_dir, staging, _keys(connection, store))
    for look in range(_MAX_LOOKS):
        with frozen.frozen(database) as connection:
            keys = _keys(connection, store)
            lacking = _link_all(data_dir, staging, keys)
            missing = lacking if look == 0 else missing & lacking
            if lacking and (look < _MAX_LOOKS - 1 or lacking != missing):
                continue
            on_stage("rows", 0.3)
            frozen.copy_to_file(connection, staging / DATABASE_FILE)
            models = frozen.named(connection).models
            break
    else:
        raise Conflict("files go faster than they can be linked: make the backup while less is under way")
    _remove_unnamed(staging, keys)
    for name in (*_SMALL_FILES, "installation.json"):
        if (data_dir / name).is_file():
            shutil.copy2(data_dir / name, staging / name)
    (staging / _LOGS).mkdir()
    for log_file in filter(Path.is_file, (data_dir / _LOGS).glob("*")):
        # One may be put aside meanwhile.
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(log_file, staging / _LOGS / log_file.name)
    facts = Facts(
        selfloop.__version__,
        time.time(),
        str(data_dir),
        store,
        {name: path for name, path in models.items() if Path(path).is_absolute()},
        sorted(missing),
    )
    (staging / _FACTS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts)) + b"\n")
    return facts


def _keys(connection: Connection, store: str) -> set[str]:
    """Relative paths of all files and folders that the rows name and that are ours to keep."""
    named = frozen.named(connection)
    keys = named.keys | {pinned.pinned_key(*pair) for pair in named.held}
    keys |= {path for path in named.models.values() if not Path(path).is_absolute()}
    if store == LOCAL:
        keys |= {f"checkpoints/{id}" for id in named.checkpoints}
    return keys


def _link_all(data_dir: Path, staging: Path, keys: set[str]) -> set[str]:
    """Link what is not there yet; returns what could not be found."""
    lacking: set[str] = set()
    for key in keys:
        if not (staging / key).exists() and not _link(data_dir / key, staging / key):
            lacking.add(key)
    return lacking


def _link(source: Path, target: Path) -> bool:
    """A file or a folder, whole; False where it is not there, or goes meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        if source.is_dir():
            shutil.copytree(source, part, copy_function=_link_or_copy)
            part.rename(target)
        else:
            _link_or_copy(str(source), str(target))
    except (FileNotFoundError, shutil.Error):
        shutil.rmtree(part, ignore_errors=True)
        return False
    return True


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        _copy(source, target)


def _copy(source: str, target: str) -> None:
    shutil.copy2(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _remove_unnamed(staging: Path, keys: set[str]) -> None:
    """What was linked ahead, and is named no more."""
    named = {staging / key for key in keys}
    above = {parent for path in named for parent in path.parents}
    for folder, folders, files in os.walk(staging):
        for name in (*folders.copy(), *files):
            path = Path(folder) / name
            if path in named:
                if name in folders:
                    folders.remove(name)
            elif path not in above and path != staging / DATABASE_FILE:
                if name in folders:
                    folders.remove(name)
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _damaged(staging: Path) -> Iterator[str]:
    """Folders whose files are not those that were written, in words."""
    for manifest in sorted(staging.rglob(MANIFEST_FILE)):
        try:
            check_folder(manifest.parent)
        except CheckpointDamaged as error:
            yield str(error)


def _publish(staging: Path, target: Path) -> None:
    if staging.stat().st_dev == _parent(target).stat().st_dev:
        frozen.check_file(staging / DATABASE_FILE)
        _sync(staging)
        _rename(staging, target, "DIR")
        return
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=_parent(target)))
    try:
        _copy_tree(staging, part)
        check_backup(part)
        _rename(part, target, "DIR")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy_tree(source: Path, target: Path) -> None:
    """Into a folder that is there, durably."""
    shutil.copytree(source, target, copy_function=_copy, dirs_exist_ok=True)
    _sync(target)


def _sync(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        sync_directory(Path(folder))


def _rename(part: Path, target: Path, field: str) -> None:
    """Raises :class:`BadRequest` where others could look in all the same: there are keys in it."""
    part.chmod(0o700)
    if part.stat().st_mode & 0o077:
        raise BadRequest(
            field, f"a place where files can be closed to others, as keys are among them; not {target.parent}"
        )
    # Over an empty folder, too.
    part.rename(target)
    sync_directory(target.parent)


def _check_target(target: Path, field: str) -> None:
    if target.is_dir():
        if any(target.iterdir()):
            raise BadRequest(field, f"a folder that is new or empty; {target} has files")
    elif target.exists() or target.is_symlink():
        raise BadRequest(field, f"a folder that is new or empty; {target} is a file")
    elif not target.parent.is_dir():
        raise BadRequest(field, f"a folder in one that is there; {target.parent} is not")


def _parent(target: Path) -> Path:
    return target.resolve().parent
