"""A data directory's rows go from its file to a real PostgreSQL server, all or none, and everything goes on there."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from sqlalchemy import create_engine, select
from sqlalchemy.engine import URL
from typer.testing import CliRunner

import stores
from gateway import MODEL, Gateway, Run, datum, ok, selfloop, words
from selfloop.cli.main import app
from selfloop.control.data_dir.identity import DataDirIdentity
from selfloop.storage.db import migrate
from selfloop.storage.db.address import sqlite_url
from selfloop.storage.db.tables import Base


class Moving:
    """A gateway on files, and the database that its rows are to go to."""

    def __init__(self, gateway: Gateway, postgres: stores.PostgresServer, variables: dict[str, str]) -> None:
        self.gateway = gateway
        self.postgres = postgres
        self.database = postgres.ensure(stores.name_of(gateway.data_dir), "template0")
        self.variables = variables
        """For every command on the data directory."""

    def invoke(self, *command: str, **variables: str) -> Result:
        return CliRunner().invoke(app, [*command, "--data-dir", str(self.gateway.data_dir)], env=variables)

    def run(self, *command: str) -> str:
        """What a command says that must not fail."""
        done = self.invoke(*command)
        assert done.exit_code == 0, done.output
        return done.output

    def move(self) -> Result:
        return self.invoke("migrate-database", SELFLOOP_DATABASE_URL=self.postgres.text(self.database))

    def refused(self, *command: str, **variables: str) -> str:
        """The error of a command that must fail."""
        done = self.invoke(*command, **variables)
        assert done.exit_code == 1, done.output
        assert isinstance(done.exception, SystemExit)
        assert stores.PASSWORD not in done.output
        return " ".join(done.stderr.split())

    def refused_move(self) -> str:
        return self.refused("migrate-database", SELFLOOP_DATABASE_URL=self.postgres.text(self.database))

    def execute(self, statement: str) -> None:
        with self.postgres.admin(self.database) as connection:
            connection.execute(statement)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def tables(self) -> dict[str, list[object]]:
        return rows_of(self.postgres.url(self.database))


class PowerCut(Exception):
    pass


def rows_of(url: URL) -> dict[str, list[object]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        tables = Base.metadata.sorted_tables
        rows = {t.name: sorted(map(repr, connection.execute(select(t)).all())) for t in tables}
    engine.dispose()
    return rows


@pytest.fixture
def moving(
    postgres: stores.PostgresServer, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Moving]:
    variables: dict[str, str] = {}
    monkeypatch.setattr(stores, "environment", lambda _data_dir: variables)
    data_dir = tmp_path / "data"
    selfloop("models", "add", str(tiny_model_folder), "--name", MODEL, "--data-dir", str(data_dir))
    own = Gateway(data_dir)
    yield Moving(own.start(), postgres, variables)
    own.close()


def test_everything_goes_on_in_the_new_database(moving: Moving):
    own, where = moving.gateway, ("--data-dir", str(moving.gateway.data_dir))
    run = Run.create(own.http(), seed=3, name="nul \x00 and \ue000").attached()
    calm = Run.create(own.http(), seed=3).attached()
    run.train(1)
    path = run.save("kept")
    files = run.files(path)
    loss = {"data": [datum(words(2))], "loss_fn": "cross_entropy"}
    waiting = run.submit("optim_step", seq=run.seq + 2, adam_params={"learning_rate": 1e-2})
    key = selfloop("keys", "create", "another", *where).split()[-1]
    assert "another selfloop server" in moving.refused_move()
    own.kill()

    moving.execute("CREATE TABLE theirs (id int)")
    assert "'theirs' that is not Selfloop's" in moving.refused_move()
    moving.execute("DROP TABLE theirs")
    assert moving.refused("migrate-database", SELFLOOP_DATABASE_URL="postgresql://x@127.0.0.1:1/x").count("be reached")

    # It fails half-way: nothing is there, and nothing is changed here.
    migrate.upgrade(moving.postgres.url(moving.database))
    moving.execute("ALTER TABLE operations ADD CONSTRAINT never CHECK (state <> 'queued')")
    before = rows_of(sqlite_url(own.data_dir / "selfloop.db"))
    assert "nothing was" in moving.refused_move()
    assert not any(moving.tables().values())
    moving.execute("ALTER TABLE operations DROP CONSTRAINT never")

    url = moving.postgres.text(moving.database)
    said = selfloop("migrate-database", "--database-url", url, *where)
    assert stores.PASSWORD not in said
    assert f"{sum(map(len, before.values()))} rows moved to postgresql://tester@127.0.0.1" in said
    assert moving.tables() == before
    assert before["operations"]

    # The file is put aside, and nobody starts without the database by mistake.
    assert not (own.data_dir / "selfloop.db").exists()
    assert rows_of(sqlite_url(own.data_dir / "selfloop.db.moved")) == before
    assert "no selfloop.db" in moving.refused_move()
    assert "belongs to the rows in postgresql://" in moving.refused("keys", "list")

    moving.variables["SELFLOOP_DATABASE_URL"] = url
    own.start()
    run.submit("forward_backward", **loss)
    assert run.result(waiting)["metrics"]["step"] == 2
    run.seq += 1
    calm.train(1, 2)
    assert run.state() == calm.state()
    assert run.files(path) == files
    assert ok(own.http(key).get(f"/v1/loops/runs/{run.id}"))["run"]["name"] == "nul \x00 and \ue000"
    own.terminate()
    # An old file is not taken for the rows that went on elsewhere.
    (own.data_dir / "selfloop.db.moved").rename(own.data_dir / "selfloop.db")
    assert "is not empty: it has " in moving.refused_move()
    assert "belongs to the rows in postgresql://" in moving.refused("keys", "list")


def _cut_before_the_note(patched: pytest.MonkeyPatch) -> None:
    def cut(_self: DataDirIdentity, _url: URL) -> None:
        raise PowerCut

    patched.setattr(DataDirIdentity, "move_to", cut)


def _cut_before_the_file_is_put_aside(patched: pytest.MonkeyPatch) -> None:
    original = Path.rename

    def cut(self: Path, target: Path) -> Path:
        if self.name == "selfloop.db":
            raise PowerCut
        return original(self, target)

    patched.setattr(Path, "rename", cut)


@pytest.fixture
def cut_off(postgres: stores.PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Moving:
    """A data directory without a server, and a database."""
    monkeypatch.setattr(stores, "environment", lambda _data_dir: {})
    moving = Moving(Gateway(tmp_path), postgres, {})
    moving.run("keys", "create", "first")
    return moving


@pytest.mark.parametrize("cut", [_cut_before_the_note, _cut_before_the_file_is_put_aside])
def test_a_move_that_was_cut_off_is_finished_by_another(
    cut_off: Moving, cut: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
):
    file = cut_off.gateway.data_dir / "selfloop.db"
    before = rows_of(sqlite_url(file))
    with monkeypatch.context() as patched:
        cut(patched)
        assert isinstance(cut_off.move().exception, PowerCut)
    assert cut_off.tables() == before == rows_of(sqlite_url(file))

    done = cut_off.move()
    assert f"{sum(map(len, before.values()))} rows moved to postgresql://" in done.output, done.output
    assert cut_off.tables() == before == rows_of(sqlite_url(file.with_name("selfloop.db.moved")))
    assert "no selfloop.db" in cut_off.refused_move()
    assert "belongs to the rows in postgresql://" in cut_off.refused("keys", "list")


def test_a_move_that_was_cut_off_is_not_finished_with_other_rows(cut_off: Moving, monkeypatch: pytest.MonkeyPatch):
    before = rows_of(sqlite_url(cut_off.gateway.data_dir / "selfloop.db"))
    with monkeypatch.context() as patched:
        _cut_before_the_note(patched)
        cut_off.move()
    cut_off.run("keys", "create", "since")
    assert "is not empty: it has " in cut_off.refused_move()
    assert cut_off.tables() == before
    assert "since" in cut_off.run("keys", "list")
