"""Blobs appear whole or not at all; databases migrate forward and refuse what is newer."""

import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import migrate
from selfloop.storage.db.address import sqlite_url
from selfloop.storage.db.tables import Base


def test_a_blob_is_stored_and_removed(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.put("journal/run/op", b"bytes")
    assert blobs.get("journal/run/op") == b"bytes"
    assert list(blobs.children("journal/run")) == ["op"]
    blobs.delete("journal/run/op")
    blobs.delete("journal/run/op")
    assert list(blobs.children("journal/run")) == []


def test_a_folder_is_published_in_one_move_and_may_be_written_again(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    for content in ("first", "second"):
        aside = blobs.prepare_folder("checkpoints/abc.part")
        assert not aside.exists()
        aside.mkdir()
        (aside / "file").write_text(content)
        blobs.publish_folder("checkpoints/abc.part", "checkpoints/abc")
        assert (tmp_path / "checkpoints/abc/file").read_text() == content


def test_no_key_leaves_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root"):
        LocalBlobs(tmp_path / "root").get("../secret")


def test_migrations_give_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    database = sqlite_url(tmp_path / "x.db")
    migrate.upgrade(database)
    migrate.upgrade(database)
    engine = create_engine(database)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    migrate.upgrade(sqlite_url(database))
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(migrate.NewerDatabase, match="newer Selfloop"):
        migrate.upgrade(sqlite_url(database))
