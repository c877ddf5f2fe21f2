"""What an export refuses before any work, and how it appears."""

import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

import stores
from selfloop.control.data_dir.identity import DATABASE_FILE
from selfloop.control.gateway import DataDirectory
from selfloop.control.resources.checkpoints import exports
from selfloop.control.resources.checkpoints.imports import Owner, _Facts
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import CheckpointRow
from selfloop.types.errors import BadRequest, Conflict, NotFound, OperationFailed

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
async def data(data_template: Path, tmp_path: Path):
    directory = stores.data_directory(stores.copy(data_template, tmp_path / "data"))
    yield directory
    await directory.close()


@pytest.fixture
async def uri(data: DataDirectory, tmp_path: Path) -> str:
    """A checkpoint of the tiny model, recorded as an import records it."""
    team = await data.access.team(None)
    owner = await data.access.owner_key(team)
    assert (await data.access.owner_key(team)).id == owner.id
    assert owner.revoked_at is not None
    model = await data.catalogue.resolve("tiny/llama")
    aside = data._store.staging("chk0001")
    aside.mkdir(parents=True, exist_ok=True)
    (aside / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    facts = _Facts(1000, 4, 8.0, targets="attn,mlp", changes_nothing=False)
    run = await data.imports._record("chk0001", model, facts, Owner(team.id, owner.id), "mine")
    return f"bt://loops:{run.id}/weights/imported"


async def test_the_disk_must_have_room(data: DataDirectory, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exports.shutil, "disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(OperationFailed, match=r"needs [\d,]+ bytes; the disk of .* has 1$"):
        await data.exports.plan(uri, tmp_path / "a" / "b", "merged")
    monkeypatch.undo()
    merged = await data.exports.plan(uri, tmp_path / "a" / "b", "merged")
    adapter = await data.exports.plan(uri, tmp_path / "a" / "b", "peft")
    assert adapter.needed_bytes == 1000 + exports._SPARE_BYTES < merged.needed_bytes
    gguf, half = [await data.exports.plan(uri, tmp_path / "a", "gguf", dtype=dtype) for dtype in (None, "f16")]
    assert gguf.needed_bytes == merged.needed_bytes > half.needed_bytes > merged.needed_bytes / 2
    assert not (tmp_path / "a").exists()
    folder = await data._store.folder("chk0001")
    (folder / "adapter_config.json").write_text('{"target_modules": ["q_proj", "lm_head"]}')
    genuine = exports.read_facts
    monkeypatch.setattr(exports, "read_facts", lambda folder: replace(genuine(folder), num_tied=1000))
    untied = await data.exports.plan(uri, tmp_path / "a" / "b", "merged")
    assert untied.needed_bytes > merged.needed_bytes


async def test_only_a_gguf_has_a_dtype(data: DataDirectory, uri: str, tmp_path: Path):
    for format in ("merged", "peft"):
        with pytest.raises(BadRequest) as refused:
            await data.exports.plan(uri, tmp_path / "out", format, dtype="f16")
        assert refused.value.field == "dtype"


async def test_a_target_that_holds_something_is_refused(data: DataDirectory, uri: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(Conflict, match="exists already"):
            await data.exports.plan(uri, taken, "peft")


async def test_an_expired_checkpoint_is_gone(data: DataDirectory, uri: str, tmp_path: Path):
    db = Database(stores.database_url(tmp_path / "data", DATABASE_FILE))
    async with db.write() as session:
        row = await session.get(CheckpointRow, "chk0001")
        assert row is not None
        row.expires_at = time.time() - 1
    await db.close()
    with pytest.raises(NotFound):
        await data.exports.plan(uri, tmp_path / "out", "peft")


async def test_a_folder_that_was_filled_meanwhile_is_kept(data: DataDirectory, uri: str, tmp_path: Path):
    aside, target = tmp_path / "aside", tmp_path / "out"
    for folder in (aside, target):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with pytest.raises(OSError, match="not empty"):
        exports._publish(aside, target)
    assert (target / "file").read_text() == "out"


async def test_an_import_that_cannot_be_recorded_leaves_no_folder(data: DataDirectory, uri: str, tmp_path: Path):
    """A server that started meanwhile has cleared the half-written folder away."""
    before = await data.all_runs()
    model = await data.catalogue.resolve("tiny/llama")
    team = await data.access.team(None)
    owner = Owner(team.id, (await data.access.owner_key(team)).id)
    with pytest.raises(FileNotFoundError):
        await data.imports._record(
            "chk0002", model, _Facts(1, 4, 8.0, targets="attn,mlp", changes_nothing=False), owner, "mine"
        )
    assert [run.id for run in await data.all_runs()] == [run.id for run in before]
    assert not (tmp_path / "data" / "checkpoints" / "chk0002").exists()
