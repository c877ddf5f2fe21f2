"""Backups of a data directory whose files come and go meanwhile; what is refused, and what is noticed."""

import errno
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfloop.cli.main import app
from selfloop.control.data_dir import backup
from selfloop.control.data_dir.backup import check_backup, clear_leftovers, make_backup, restore
from selfloop.control.data_dir.identity import DATABASE_FILE
from selfloop.control.gateway import DataDirectory, database_url
from selfloop.storage.db.frozen import Damaged
from selfloop.types.errors import BadRequest, CheckpointDamaged, Conflict


@pytest.fixture
async def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    data = DataDirectory(folder)
    await data.seed()
    await data.close()
    (folder / "api_key").write_text("slk-secret")
    (folder / "api_key").chmod(0o600)
    for name in ("one", "two"):
        put(folder, name)
    return folder


def put(data_dir: Path, name: str, *, with_row: bool = True) -> Path:
    """An operation's payload in a file."""
    key = f"journal/run/{name}.op"
    (data_dir / key).parent.mkdir(parents=True, exist_ok=True)
    (data_dir / key).write_bytes(name.encode() * 9000)
    if with_row:
        execute(
            data_dir,
            "INSERT INTO operations (run_id, id, epoch, seq, kind, fingerprint, state, created_at, payload_key) "
            "VALUES ('run', ?, 0, (SELECT count(*) FROM operations), 'forward', '', 'queued', 0, ?)",
            name,
            key,
        )
    return data_dir / key


def execute(data_dir: Path, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(data_dir / DATABASE_FILE)) as connection, connection:
        connection.execute(statement, values)


def back_up(data_dir: Path, target: Path) -> backup.Backup:
    return make_backup(data_dir, database_url(data_dir, None), "local", target, lambda stage, part: None)


def identity(data_dir: Path) -> str:
    return json.loads((data_dir / "installation.json").read_text())["id"]


def payloads(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "journal").rglob("*.op")}


async def test_what_rows_name_is_in_it_and_comes_back(data_dir: Path, tmp_path: Path):
    put(data_dir, "without", with_row=False)
    made = back_up(data_dir, tmp_path / "backup")
    assert payloads(tmp_path / "backup") == {"one", "two"}
    assert (made.facts.missing, made.damaged) == ([], [])
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "backup/api_key").stat().st_mode & 0o077 == 0
    assert (data_dir / "journal/run/one.op").stat().st_nlink == 2, "linked, not copied"
    assert not (data_dir / "backup.part").exists()
    facts = await restore(tmp_path / "backup", tmp_path / "restored", lambda stage, part: None)
    assert facts.data_dir == str(data_dir)
    for name in ("journal/run/one.op", "api_key"):
        assert (tmp_path / "restored" / name).read_bytes() == (data_dir / name).read_bytes()
    assert (tmp_path / "restored/journal/run/one.op").stat().st_nlink == 1, "the backup's files stay its own"
    assert identity(tmp_path / "restored") != identity(data_dir)
    await restore(tmp_path / "backup", tmp_path / "same", lambda stage, part: None, take_over=True)
    assert identity(tmp_path / "same") == identity(data_dir)
    data = DataDirectory(tmp_path / "restored")
    await data.seed()
    await data.close()


@pytest.mark.parametrize("linked", [True, False])
async def test_files_that_go_and_come_meanwhile(
    linked: bool, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As under a server: each look at the rows finds a file gone that they named, and another one in its place."""
    num_looks = 0
    original = backup._link_all

    def busy(source: Path, staging: Path, keys: set[str]) -> set[str]:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 2:
            for name in ("one", "two"):
                execute(data_dir, "DELETE FROM operations WHERE id = ?", name)
            put(data_dir, "three").unlink()
            (data_dir / "journal/run/two.op").unlink()
            execute(data_dir, "DELETE FROM operations WHERE id = 'three'")
            put(data_dir, "four")
            keys = keys | {"journal/run/three.op"}
        return original(source, staging, keys)

    def no_link(*_paths: object, **_options: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(backup, "_link_all", busy)
    if not linked:
        monkeypatch.setattr(os, "link", no_link)
    made = back_up(data_dir, tmp_path / "backup")
    assert num_looks == 3
    assert payloads(tmp_path / "backup") == {"four"}
    with closing(sqlite3.connect(tmp_path / "backup" / DATABASE_FILE)) as connection:
        assert connection.execute("SELECT id FROM operations").fetchall() == [("four",)]
    assert made.facts.missing == []
    check_backup(tmp_path / "backup")


def test_a_file_that_is_lost_is_reported_and_does_not_prevent_it(data_dir: Path, tmp_path: Path):
    (data_dir / "journal/run/one.op").unlink()
    assert back_up(data_dir, tmp_path / "backup").facts.missing == ["journal/run/one.op"]
    done = CliRunner().invoke(app, ["backup", str(tmp_path / "other"), "--data-dir", str(data_dir)])
    assert (done.exit_code, done.stderr) == (0, "in the data directory: journal/run/one.op was gone\n")


async def test_a_backup_that_changed_is_not_restored(data_dir: Path, tmp_path: Path):
    back_up(data_dir, tmp_path / "backup")
    for name in ("journal/run/one.op", DATABASE_FILE, "backup.json", "selfloop.digests"):
        path = tmp_path / "backup" / name
        whole = path.read_bytes()
        path.chmod(0o600)
        path.unlink()  # The data directory's file is another one from now on.
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises((CheckpointDamaged, Damaged), match=path.name.replace(".", r"\.")):
            check_backup(tmp_path / "backup")
        with pytest.raises((CheckpointDamaged, Damaged)):
            await restore(tmp_path / "backup", tmp_path / "restored", lambda stage, part: None)
        path.write_bytes(whole)
    check_backup(tmp_path / "backup")
    (tmp_path / "backup/journal/run/two.op").unlink()
    with pytest.raises(CheckpointDamaged, match="it is gone"):
        check_backup(tmp_path / "backup")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "data"]


async def test_nothing_is_overwritten(data_dir: Path, tmp_path: Path):
    made = tmp_path / "backup"
    back_up(data_dir, made)
    for target, expected in (
        (made, "has files"),
        (data_dir / "api_key", "is a file"),
        (tmp_path / "no/where", "is not"),
        (data_dir / "inside", "outside of the data directory"),
    ):
        with pytest.raises(BadRequest, match=expected):
            back_up(data_dir, target)
    with pytest.raises(BadRequest, match="has files"):
        await restore(made, data_dir, lambda stage, part: None)
    with pytest.raises(BadRequest, match="selfloop backup"):
        await restore(data_dir, tmp_path / "new", lambda stage, part: None)
    (tmp_path / "empty").mkdir(mode=0o755)
    back_up(data_dir, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_one_backup_at_a_time_and_what_a_killed_one_left_goes(data_dir: Path, tmp_path: Path):
    left = data_dir / "backup.part/files/journal/run/old.op"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"old")
    with backup._Staging(data_dir):
        assert not left.exists()
        clear_leftovers(data_dir)
        assert left.parents[2].exists(), "one is being made"
        with pytest.raises(Conflict, match="another backup"):
            back_up(data_dir, tmp_path / "backup")
    left.parent.mkdir(parents=True)
    clear_leftovers(data_dir)
    assert not (data_dir / "backup.part").exists()
    assert not (tmp_path / "backup").exists()


async def test_the_database_and_the_bucket_must_be_those_of_the_directory(data_dir: Path, tmp_path: Path):
    postgres = database_url(data_dir, "postgresql://somebody@db.example.org/other")
    with pytest.raises(Conflict, match=r"rows of .* are in selfloop\.db, not in postgresql://"):
        make_backup(data_dir, postgres, "local", tmp_path / "backup", lambda stage, part: None)
    with pytest.raises(Conflict, match=r"checkpoints of .* are in local, not in s3://bucket"):
        make_backup(
            data_dir, database_url(data_dir, None), "s3://bucket", tmp_path / "backup", lambda stage, part: None
        )
    with pytest.raises(Conflict, match="is no data directory"):
        back_up(tmp_path, tmp_path / "backup")
    back_up(data_dir, tmp_path / "backup")
    with pytest.raises(Conflict, match="are in local"):
        await restore(tmp_path / "backup", tmp_path / "new", lambda stage, part: None, store="s3://bucket")
