"""Blobs appear whole or not at all; databases migrate forward and refuse what is newer."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import migrate
from selfloop.storage.db.address import sqlite_url
from selfloop.storage.db.tables import Base


def test_the_names_of_the_migrations_show_their_order() -> None:
    script = ScriptDirectory(str(Path(migrate.__file__).parent / "migrations"))
    assert migrate.revisions() == [revision.revision for revision in script.walk_revisions()][::-1]


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


def test_migrations_give_the_tables_that_the_code_uses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = sqlite_url(tmp_path / "x.db")
    with caplog.at_level(logging.INFO):
        migrate.upgrade(database)
    assert not caplog.records, "nobody needs to read of each step at a first start"
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


def at_schema_2(database: Path) -> None:
    """As an older version left it, with a team."""
    command.upgrade(migrate._config(sqlite_url(database)), "0002")
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("INSERT INTO teams (id, name, is_default, created_at) VALUES ('t', 'mine', 1, 0)")
        connection.commit()


def columns_and_teams(database: Path) -> tuple[set[str], list[str]]:
    with closing(sqlite3.connect(database)) as connection:
        columns = {row[1] for row in connection.execute("PRAGMA table_info(sessions)")}
        return columns, [row[0] for row in connection.execute("SELECT name FROM teams")]


def test_an_older_database_is_copied_and_migrated(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    at_schema_2(database)
    migrate.upgrade(sqlite_url(database))
    assert migrate.schema_of(sqlite_url(database)) == "current"
    columns, teams = columns_and_teams(database)
    assert "ended_at" in columns
    assert teams == ["mine"]
    copy = migrate.backup_path(database, "0002")
    columns, teams = columns_and_teams(copy)
    assert "ended_at" not in columns
    assert teams == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} <= {"x.db", "x.db-wal", "x.db-shm", copy.name}


def test_a_migration_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    at_schema_2(database)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE audit_events (in_the_way)")
        connection.commit()
    with pytest.raises(OperationalError, match="audit_events"):
        migrate.upgrade(sqlite_url(database))
    assert "ended_at" not in columns_and_teams(database)[0], "what came before the failure is undone"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE audit_events")
        connection.commit()
    migrate.upgrade(sqlite_url(database))
    assert migrate.schema_of(sqlite_url(database)) == "current"
