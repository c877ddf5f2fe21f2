"""The demo's choreography, with a stand-in for the server and for the script."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfloop.cli import demo

SERVER = """
import http.server, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()
        self.wfile.write(os.environ["SELFLOOP_API_KEY"].encode())
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
server.serve_forever()
"""

SCRIPT = """
import os, urllib.request
url = os.environ["LOOPS_BASE_URL"]
assert os.environ["HF_ENDPOINT"] == url + "/hf"
assert urllib.request.urlopen(url + "/healthz").read().decode() == os.environ["BASETEN_API_KEY"]
print("the script ran", flush=True)
"""


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    examples = tmp_path / "examples"
    examples.mkdir()
    (examples / "quickstart.py").write_text(SCRIPT)
    data_dir = tmp_path / "data"

    def serve(url: str, data_dir: Path) -> list[str]:
        return [sys.executable, "-c", SERVER, url.rpartition(":")[2], str(data_dir / "pid")]

    monkeypatch.setattr(demo, "EXAMPLES", examples)
    monkeypatch.setattr(demo, "client_python", lambda data_dir, console: sys.executable)
    monkeypatch.setattr(demo, "_serve_command", serve)
    return data_dir


def server_is_gone(data_dir: Path) -> bool:
    try:
        os.kill(int((data_dir / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_the_whole_way(data_dir: Path, capfd: pytest.CaptureFixture[str]):
    assert demo.run_demo(data_dir) == 0
    out = capfd.readouterr().out
    assert "the script ran" in out
    assert "export LOOPS_BASE_URL=" in out
    assert server_is_gone(data_dir)


def test_the_exit_code_is_the_scripts(data_dir: Path, capfd: pytest.CaptureFixture[str]):
    (demo.EXAMPLES / "quickstart.py").write_text("import sys; sys.exit(3)")
    assert demo.run_demo(data_dir) == 3
    assert "last words" in capfd.readouterr().out
    assert server_is_gone(data_dir)


def test_arguments_reach_the_script(data_dir: Path, capfd: pytest.CaptureFixture[str]):
    (demo.EXAMPLES / "quickstart.py").write_text("import sys; print(sys.argv[1:])")
    assert demo.run_demo(data_dir, base_model="org/name", steps=2) == 0
    assert "'--base-model', 'org/name', '--steps', '2'" in capfd.readouterr().out


def test_a_server_that_does_not_start(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    command = [sys.executable, "-c", "print('no [bold] port'); raise SystemExit(7)"]
    monkeypatch.setattr(demo, "_serve_command", lambda url, data_dir: command)
    assert demo.run_demo(data_dir) == 1
    out = capfd.readouterr().out
    assert "code 7" in out
    assert "no [bold] port" in out


def test_the_script_ends_with_its_server(data_dir: Path, capfd: pytest.CaptureFixture[str]):
    text = f"import os, signal, time; os.kill(int(open({str(data_dir / 'pid')!r}).read()), 9); time.sleep(60)"
    (demo.EXAMPLES / "quickstart.py").write_text(text)
    started = time.monotonic()
    assert demo.run_demo(data_dir) == 1
    assert time.monotonic() - started < 20
    assert "server ended" in capfd.readouterr().out


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_behind_by_a_signal(data_dir: Path, signum: int, code: int):
    (demo.EXAMPLES / "quickstart.py").write_text("print('running', flush=True)\nimport time; time.sleep(60)")
    program = f"""
import signal, sys, pathlib
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where whoever runs the tests ignores it
from selfloop.cli import demo
demo.EXAMPLES = pathlib.Path({str(demo.EXAMPLES)!r})
demo.client_python = lambda data_dir, console: sys.executable
server = [sys.executable, "-c", {SERVER!r}]
demo._serve_command = lambda url, data_dir: [*server, url.rpartition(":")[2], str(data_dir / "pid")]
sys.exit(demo.run_demo(pathlib.Path({str(data_dir)!r})))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("running" in line for line in process.stdout)
        process.send_signal(signum)
        assert process.wait(30) == code
    assert server_is_gone(data_dir)


def test_without_the_script(data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "EXAMPLES", data_dir / "nowhere")
    assert demo.run_demo(data_dir) == 1
    assert "reinstall selfloop" in capfd.readouterr().out


def test_the_script_sees_only_the_demos_server(tmp_path: Path):
    environ = {
        "LOOPS_TEAM": "x",
        "HF_TOKEN": "x",
        "LOOPS_REUSE_FROM_RUN_ID": "x",
        "NO_PROXY": "a",
        "HOME": "/h",
    }
    env = demo.client_environment(environ, "http://127.0.0.1:1", "key", tmp_path)
    assert not {"LOOPS_TEAM", "HF_TOKEN", "LOOPS_REUSE_FROM_RUN_ID"} & env.keys()
    assert (env["NO_PROXY"], env["HOME"], env["WANDB_MODE"]) == ("a,127.0.0.1", "/h", "disabled")
