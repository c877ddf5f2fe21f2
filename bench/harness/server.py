"""A served gateway in a process of its own, as users start it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SERVE = ("-m", "selfloop.cli.main", "serve", "--no-prepare")
"""Without the embedded model, which would be made ready beside what is measured."""

_START_PATIENCE_S = 120.0
_SHOWN_CHARS = 4000


class Server:
    """A gateway on a free port, which may be killed and started again on the same one."""

    def __init__(self, data_dir: Path, *options: str, program: Sequence[str] = SERVE) -> None:
        """
        Args:
            data_dir: a folder that is there.
            options: further arguments of the command.
            program: what Python runs; it takes ``--port`` and ``--data-dir`` as ``selfloop serve`` does.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = secrets.token_urlsafe(16)
        self.log_path = data_dir / "bench-server.log"
        self.start_s = 0.0
        """From the launch to the first answer."""
        self._arguments = [*program, "--port", str(self.port), "--data-dir", str(data_dir), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers. Raises :class:`RuntimeError` with what it wrote when it does not."""
        environment = {**os.environ, "SELFLOOP_API_KEY": self.key}
        with open(self.log_path, "ab") as log:
            started = time.perf_counter()
            command = [sys.executable, *self._arguments]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while not self._is_healthy():
            if self._process.poll() is not None or time.perf_counter() > started + _START_PATIENCE_S:
                self.stop()
                raise RuntimeError(f"the server does not start:\n{self.log_path.read_text()[-_SHOWN_CHARS:]}")
            time.sleep(0.005)
        self.start_s = time.perf_counter() - started

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def hosts(self) -> list[psutil.Process]:
        """The processes that have a base model in memory, also those that a server before this one left."""
        return hosts_of(self.data_dir)

    def workers(self) -> list[psutil.Process]:
        """Those that live now."""
        return [worker for host in self.hosts() for worker in children_of(host)]

    def worker(self) -> psutil.Process:
        """Its one worker."""
        (worker,) = self.workers()
        return worker

    def kill_worker(self, patience_s: float = 10.0) -> bool:
        """``kill -9`` of a worker, of the next one if there is none now; False when none came."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            for worker in self.workers():
                worker.send_signal(signal.SIGKILL)
                return True
            time.sleep(0.01)
        return False

    def kill(self) -> None:
        """``kill -9``; the workers end by themselves, their hosts wait for the next start."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    def get(self, path: str) -> Any:
        """The JSON of a management route."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def serving(data_dir: Path, *options: str, program: Sequence[str] = SERVE) -> Generator[Server]:
    """A :class:`Server` that runs until the context ends."""
    server = Server(data_dir, *options, program=program)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def hosts_of(data_dir: Path) -> list[psutil.Process]:
    """By the record of themselves whose path they were given."""
    record = f'"record":"{data_dir}/workers/'
    # Their workers are forked from them, and have the same command line.
    return [p for p in psutil.process_iter() if any(record in part for part in _host_arguments(p))]


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """None of a process that is gone."""
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def _host_arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.name() != "selfloop-worker" else []
    except psutil.Error:
        return []


def peak_rss_bytes(process: psutil.Process) -> int:
    """The most that the process ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def add_model(data_dir: Path, folder: Path, name: str) -> None:
    """Put a local model folder in the catalogue of a new data directory."""
    command = [sys.executable, "-m", "selfloop.cli.main", "models", "add", str(folder.resolve()), "--name", name]
    subprocess.run([*command, "--data-dir", str(data_dir)], check=True, stdout=subprocess.DEVNULL)
