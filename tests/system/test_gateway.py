"""The gateway process itself: what it weighs, and what it must not hold."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

import stores
from gateway import KEY, Gateway, Run, copy_data, environment, ok
from selfloop.cli import engine_libraries
from selfloop.cli.main import app
from selfloop.types.client_variables import client_variables


def test_the_gateway_is_light(gateway: Gateway, http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1)
    run.save("some", "save_weights_for_sampler")
    sample = {"prompt": [3, 4, 5], "max_tokens": 4}
    ok(http.post(run.resource["sampler"]["base_url"] + "/sample", json=sample))
    mapped = Path(f"/proc/{gateway.pid}/maps").read_text()
    assert "libtorch" not in mapped
    assert "numpy" not in mapped
    worker = gateway.worker_pids()[0]
    assert "libtorch" in Path(f"/proc/{worker}/maps").read_text(), "the check can fail"


def test_a_fresh_gateway_takes_less_than_150_mb(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    run = Run.create(own.http()).attached()
    run.train(1, 2)
    # With what the clients of PostgreSQL and a bucket take.
    assert psutil.Process(own.pid).memory_info().rss < (190e6 if stores.ON_SERVERS else 150e6)


def test_healthz_needs_no_key(gateway: Gateway):
    assert ok(gateway.http(None).get("/healthz"))["status"] == "ok"


def test_secrets_stay_with_their_owner(gateway: Gateway):
    assert gateway.data_dir.stat().st_mode & 0o077 == 0
    assert (gateway.data_dir / "link_secret").stat().st_mode & 0o077 == 0
    assert KEY not in gateway.log
    for pid in gateway.worker_pids():
        assert KEY not in psutil.Process(pid).environ().values()
    for path in gateway.data_dir.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_taken_port_is_reported_before_anything_is_made(tmp_path: Path):
    """Or else the first key would be made, and shown to nobody."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "selfloop.cli.main", "serve", "--port", port, "--data-dir", str(tmp_path)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith(f"port {port} of 127.0.0.1 is taken by another program")
    assert not (tmp_path / "selfloop.db").exists()


@pytest.mark.parametrize("command", [["serve"], ["keys", "list"]])
def test_a_data_directory_that_cannot_be_used_is_reported_in_a_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(data_dir: Path) -> str:
        done = CliRunner().invoke(app, [*command, "--data-dir", str(data_dir)])
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)
        (line,) = done.stderr.splitlines()
        return line

    def no_room(_self: Path, *_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usual = os.umask(0o077)
    try:
        (tmp_path / "file").touch()
        assert refused(tmp_path / "file") == f"--data-dir: a folder; {tmp_path / 'file'} is a file"
        assert refused(tmp_path / "file/below").endswith("Not a directory")
        monkeypatch.setattr(Path, "mkdir", no_room)
        assert refused(tmp_path / "new") == "the data directory cannot be used now: No space left on device"
    finally:
        os.umask(usual)


def test_a_python_without_the_engine_is_reported_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_libraries, "ENGINE_LIBRARIES", ("no_such_library", "numpy"))
    done = CliRunner().invoke(app, ["serve", "--data-dir", str(tmp_path / "data")])
    assert done.exit_code == 1
    assert "lacks no_such_library" in done.stderr
    assert "pip install 'selfloop[engine]'" in done.stderr
    assert not (tmp_path / "data").exists()


def test_first_key_is_made_shown_once_and_kept(data_template: Path, tmp_path: Path):
    own = Gateway(copy_data(data_template, tmp_path / "data"))
    own.start(key=None)
    try:
        kept = own.data_dir / "api_key"
        assert kept.stat().st_mode & 0o777 == 0o600
        key = kept.read_text().strip()
        assert own.log.count(key) == 1
        lines, ready, _ = own.log_path.read_text().partition("Ready.\n")
        assert ready, own.log
        exports = [line for line in lines.splitlines() if line.startswith("  export ")]
        told = subprocess.check_output("\n".join([*exports, "env"]), shell=True, text=True).splitlines()
        for name, value in client_variables(own.url, key).items():
            assert f"{name}={value}" in told
        assert own.http(key).get("/v1/teams").status_code == 200
        own.terminate()
        own.start(key=None)
        assert own.http(key).get("/v1/teams").status_code == 200
        assert own.log.count(key) == 1
    finally:
        own.close()
