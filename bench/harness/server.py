"""A served gateway in a process of its own, which may be killed and started again on the same port."""

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
from pathlib import Path
from typing import Any

import psutil

START_PATIENCE_S = 120.0


class Server:
    """``selfloop serve`` on ``data_dir``; ``options`` are further arguments of the command."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = secrets.token_urlsafe(16)
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers."""
        command = [sys.executable, "-m", "selfloop.cli.main", "serve", "--no-prepare"]
        command += ["--port", str(self.port), "--data-dir", str(self.data_dir), *self._options]
        environment = {**os.environ, "SELFLOOP_API_KEY": self.key}
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_PATIENCE_S
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start; see {self.log_path}")
            time.sleep(0.02)

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


def hosts_of(data_dir: Path) -> list[psutil.Process]:
    """By the record of themselves that they were told of."""
    record = f"{data_dir}/workers/"
    # Their workers are forked from them, and have the same command line.
    return [p for p in psutil.process_iter() if any(part.startswith(record) for part in _host_arguments(p))]


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


def add_model(data_dir: Path, folder: Path, name: str) -> None:
    """Put a local model folder in the catalogue of a new data directory."""
    command = [sys.executable, "-m", "selfloop.cli.main", "models", "add", str(folder), "--name", name]
    subprocess.run([*command, "--data-dir", str(data_dir)], check=True, stdout=subprocess.DEVNULL)
