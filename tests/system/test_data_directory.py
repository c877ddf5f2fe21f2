"""A data directory is a thing that one can move and copy, and that one server has at a time."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import stores
from gateway import KEY, MODEL, Gateway, Run, datum, environment, is_gone, selfloop, until, words
from selfloop.control.data_dir.identity import DATABASE_FILE


@pytest.fixture(scope="module")
def template(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with its rows and everything else in it, the model too."""
    data_dir = tmp_path_factory.mktemp("whole") / "data"
    model = shutil.copytree(tiny_model_folder, data_dir / "own" / "tiny")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stores, "environment", lambda _data_dir: {})
        selfloop("models", "add", str(model), "--name", MODEL, "--data-dir", str(data_dir))
    return data_dir


@pytest.fixture
def on(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gateway]]:
    """Gateways on directories of a test's own, not started yet; rows and checkpoints are in the directory."""
    monkeypatch.setattr(stores, "environment", lambda _data_dir: {})
    made: list[Gateway] = []

    def on(name: str) -> Gateway:
        if not (tmp_path / name).exists():
            shutil.copytree(template, tmp_path / name).chmod(0o700)
        made.append(Gateway(tmp_path / name))
        return made[-1]

    yield on
    for own in made:
        own.close()


def as_earlier(data_dir: Path) -> None:
    """Absolute paths, as the versions before had them."""
    with closing(sqlite3.connect(data_dir / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE models SET path = ? || '/' || path WHERE path IS NOT NULL", [str(data_dir)])


def mentions(data_dir: Path) -> list[Path]:
    """Files that say where the directory lies, but for logs and what distinguishes a copy from the original."""
    skipped = ("logs", "workers", "installation.json")
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    kept = [path for path in files if path.relative_to(data_dir).parts[0] not in skipped]
    return [path for path in kept if str(data_dir).encode() in path.read_bytes()]


def second(data_dir: Path, port: int | None = None) -> "subprocess.Popen[str]":
    """Another server on a directory, in a process of its own."""
    arguments = ["serve", "--port", str(port or stores.free_port()), "--data-dir", str(data_dir), "--no-prepare"]
    return subprocess.Popen(
        [sys.executable, "-m", "selfloop.cli.main", *arguments],
        env=environment(SELFLOOP_API_KEY=KEY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refusal(process: "subprocess.Popen[str]") -> str:
    """The one line that a server which may not start says."""
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    (line,) = said.splitlines()
    return line


@pytest.mark.parametrize("how", ["move", "of an earlier version", "symbolic link", "relative"])
def test_a_directory_that_was_moved_goes_on(
    how: str, on: Callable[[str], Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = on("data")
    if how == "symbolic link":
        own.data_dir = tmp_path / "link"
        own.data_dir.symlink_to(tmp_path / "data")
    own.start()
    run = Run.create(own.http(), seed=3).attached()
    run.train(1, 2)
    path = run.save("kept")
    expected = run.logprobs()
    own.terminate()
    assert mentions(tmp_path / "data") == []
    if how == "of an earlier version":
        as_earlier(own.data_dir)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = on("moved")
    if how == "symbolic link":
        own.data_dir.unlink()
        own.data_dir.symlink_to(tmp_path / "moved")
        moved.data_dir = own.data_dir
    if how == "relative":
        monkeypatch.chdir(tmp_path)
        moved.data_dir = Path("moved")
    moved.start()
    again = Run(moved.http(), run.resource)
    again.seq = run.seq
    assert again.logprobs() == expected
    again.train(3)
    again.do("load_state", path=path)
    assert again.logprobs() == expected
    listed = selfloop("models", "list", "--data-dir", str(moved.data_dir))
    assert str(tmp_path / "moved/own/tiny") in listed
    assert "(gone)" not in listed


def test_a_copy_of_a_running_servers_directory_is_another_server(on: Callable[[str], Gateway], tmp_path: Path):
    first = on("data").start()
    run = Run.create(first.http(), seed=3).attached()
    run.train(1)
    (host,) = first.hosts()
    assert list((first.data_dir / "workers").iterdir()), "there is a note to be copied"
    shutil.copytree(first.data_dir, tmp_path / "copy")
    copy = on("copy").start()
    copied = Run(copy.http(), run.resource)
    copied.seq = run.seq
    assert copied.logprobs() == run.logprobs()
    copied.train(2)
    # Neither its life nor its death is anything to the first one's.
    assert first.hosts() == [host]
    assert host not in copy.hosts()
    first.kill()
    copy.kill_worker()
    copied.train(3)
    copy.terminate()
    assert first.hosts() == [host], "it waits for the first server"
    first.start()
    run.train(2)
    assert first.hosts() == [host]


def test_a_server_holds_its_directory_though_its_lock_file_is_deleted(on: Callable[[str], Gateway]):
    first = on("data").start()
    for name in ("gateway.lock", "installation.json"):
        (first.data_dir / name).unlink()
        assert "another selfloop server (pid " in refusal(second(first.data_dir))
    moved = first.data_dir.rename(first.data_dir.with_name("moved"))
    assert "another selfloop server" in refusal(second(moved))
    moved.rename(first.data_dir)
    first.kill()
    port = stores.free_port()
    next_one = second(first.data_dir, port)
    try:
        first.port, first.url, first.process = port, f"http://127.0.0.1:{port}", next_one
        until(first._is_healthy, "the next one serves at once")
    finally:
        next_one.terminate()
        next_one.communicate(timeout=30)


def test_of_servers_that_start_together_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    both = [second(tmp_path / "new") for _ in range(3)]
    try:
        ended = until(lambda: [one for one in both if one.poll() is not None][1:], "all but one have ended")
        assert len(ended) == 1
        for one in both:
            if one.poll() is not None:
                assert "another selfloop server" in refusal(one)
        (left,) = [one for one in both if one.poll() is None]
        assert left.stdout is not None
        assert "Selfloop serves at" in left.stdout.readline()
    finally:
        for one in both:
            one.terminate()
            one.communicate(timeout=30)


def test_a_stopped_host_is_replaced_and_the_operation_goes_on(on: Callable[[str], Gateway]):
    own = on("data").start(KEY, "--heartbeat-timeout", "3")
    run = Run.create(own.http(), seed=3).attached()
    run.train(1)
    expected = run.logprobs()
    (host,) = own.hosts()
    worker = own.worker_pid()
    os.kill(host.pid, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    operation = run.submit("forward", data=[datum(words(99))], loss_fn="cross_entropy")
    assert run.result(operation)["loss_fn_outputs"][0]["logprobs"]["data"] == expected
    assert is_gone(host.pid)
    # Also where nobody but its host is stopped.
    (host,) = own.hosts()
    os.kill(host.pid, signal.SIGSTOP)
    until(lambda: is_gone(host.pid), "the second one is noticed, too")
    assert run.logprobs() == expected
