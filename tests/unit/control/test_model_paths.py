"""The catalogue's folders in a data directory that is moved, copied, or was written by an earlier version."""

import logging
import shutil
from pathlib import Path

import pytest

import stores
from selfloop.control.resources.catalogue import EMBEDDED_MODEL, Catalogue
from selfloop.control.resources.model_paths import ModelPaths
from selfloop.storage.db import queries_models
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import ModelRow


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def row(name: str, source: str, path: Path | str | None) -> ModelRow:
    return ModelRow(name=name, source=source, created_at=0.0, path=None if path is None else str(path))


def outdated(data_dir: Path, *rows: ModelRow) -> dict[str, str]:
    return {found.name: stored for found, stored in ModelPaths(data_dir).outdated(rows)}


def test_paths_below_the_directory_are_relative_and_others_are_not(tmp_path: Path):
    paths = ModelPaths(tmp_path / "data")
    assert paths.stored(paths.target("org/name")) == "models/org--name"
    assert paths.resolved("models/org--name") == tmp_path / "data/models/org--name"
    assert paths.stored(Path("/elsewhere/model")) == "/elsewhere/model"
    assert paths.resolved("/elsewhere/model") == Path("/elsewhere/model")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert ModelPaths(tmp_path / "link").stored(tmp_path / "real/x") == "x", "a symbolic link is the same directory"


def test_absolute_paths_of_a_directory_that_stayed_become_relative(tmp_path: Path):
    outside = model_in(tmp_path / "outside")
    rows = [
        row("a/b", "hub:a/b", tmp_path / "data/models/a--b"),
        row("mine", "folder", tmp_path / "data/own/mine"),
        row("outside", "folder", outside),
        row("new", "embedded", None),
        row("done", "hub:done", "models/done"),
    ]
    assert outdated(tmp_path / "data", *rows) == {"a/b": "models/a--b", "mine": "own/mine"}


def test_absolute_paths_of_a_directory_that_was_moved_are_found(tmp_path: Path):
    here = tmp_path / "new"
    model_in(here / "own/mine")
    rows = [row("a/b", "hub:a/b", "/old/place/models/a--b"), row("mine", "folder", "/old/place/own/mine")]
    assert outdated(here, *rows) == {"a/b": "models/a--b", "mine": "own/mine"}
    # No row of ours says where it was: a folder that is there, and ends as the lost one does.
    assert outdated(here, rows[1]) == {"mine": "own/mine"}
    assert outdated(here, row("lost", "folder", "/old/place/own/lost")) == {}


def test_a_copy_uses_its_own_files(tmp_path: Path):
    model_in(tmp_path / "old/own/mine")
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    rows = [row("a/b", "hub:a/b", tmp_path / "old/models/a--b"), row("mine", "folder", tmp_path / "old/own/mine")]
    assert outdated(tmp_path / "copy", *rows)["mine"] == "own/mine"


async def test_a_start_rewrites_them_and_names_what_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    db = Database(stores.database_url(data_dir))
    async with db.write() as session:
        session.add(row(EMBEDDED_MODEL, "embedded", "/old/models/HuggingFaceTB--SmolLM2-135M-Instruct"))
        session.add(row("gone/away", "folder", "/old/elsewhere/away"))
    catalogue = Catalogue(db, data_dir)
    await catalogue.seed()
    async with db.read() as session:
        rows = {found.name: found for found in await queries_models.models(session)}
    assert rows[EMBEDDED_MODEL].path == "models/HuggingFaceTB--SmolLM2-135M-Instruct"
    assert catalogue.files_of(rows["gone/away"]) == "/old/elsewhere/away (gone)"
    with caplog.at_level(logging.WARNING):
        await catalogue.report_missing()
    assert "gone/away cannot be loaded: its folder /old/elsewhere/away is gone" in caplog.messages
    await db.close()
