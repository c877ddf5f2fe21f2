"""The server as users start it, and clients of it in processes and environments of their own."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from selfloop.cli.client_env import NO_PYTHON, find_client_python

PEERS = Path(__file__).parents[1] / "peers"
_PATIENCE_S = 10


class Server(NamedTuple):
    """A gateway that answers: where, with which key, and how long after its launch it did."""

    url: str
    key: str
    process: psutil.Process
    start_s: float

    def worker(self) -> psutil.Process:
        """Its one worker."""
        (host,) = (child for child in self.process.children() if "selfloop.worker.host" in child.cmdline())
        (worker,) = host.children()
        return worker


class Peer:
    """A child that answers each line of its input, an object with what to ``do``, with a line of JSON."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, do: str, **how: object) -> None:
        """Have it begin; :meth:`answer` waits for the end."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, **how}) + "\n")
        self._child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            sys.exit(f"{self._child.args} ended with code {self._child.wait()}")
        return json.loads(line)

    def ask(self, do: str, **how: object) -> dict[str, Any]:
        self.tell(do, **how)
        return self.answer()

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()


def client_python() -> str:
    """A Python that has the official client; ends the program when there is none."""
    python = find_client_python()
    if python is None:
        sys.exit(f"No environment with the official client: run `make setup`. {NO_PYTHON}")
    return python


def loops_client(server: Server, model: str) -> Peer:
    """bench/peers/loops_client.py on a run of its own."""
    env = {**os.environ, "LOOPS_BASE_URL": server.url, "BASETEN_API_KEY": server.key, "NO_PROXY": "127.0.0.1"}
    env.pop("PYTHONPATH", None)
    return Peer([client_python(), str(PEERS / "loops_client.py"), model], env)


def add_model(model_dir: Path, name: str, data_dir: Path) -> None:
    """Put a model folder into the catalogue of a data directory."""
    command = [sys.executable, "-m", "selfloop.cli.main", "models", "add", str(model_dir.resolve())]
    subprocess.run([*command, "--name", name, "--data-dir", str(data_dir)], check=True, capture_output=True)


@contextmanager
def serving(
    data_dir: Path, *options: str, program: Sequence[str] = ("-m", "selfloop.cli.main", "serve")
) -> Generator[Server]:
    """``selfloop serve``, or another ``program`` that takes its options, on a free port until the context ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(16)
    command = [sys.executable, *program, "--port", str(port), "--data-dir", str(data_dir)]
    log_path = data_dir / "bench-server.log"
    with open(log_path, "ab") as log:
        started = time.perf_counter()
        env = {**os.environ, "SELFLOOP_API_KEY": key}
        child = subprocess.Popen([*command, *options], env=env, stdout=log, stderr=log)
    try:
        while not _is_healthy(url):
            if child.poll() is not None:
                sys.exit(f"the server ended with code {child.returncode}:\n{log_path.read_text()}")
            time.sleep(0.005)
        yield Server(url, key, psutil.Process(child.pid), time.perf_counter() - started)
    finally:
        child.terminate()
        child.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def peak_rss_bytes(process: psutil.Process) -> int:
    """The most that the process ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
