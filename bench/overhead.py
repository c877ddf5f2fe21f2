"""What the server costs: the same training steps through the official client and in the engine alone.

    python bench/overhead.py [--rounds 4] [--steps 4] [--data-dir DIR]

Rounds alternate between the two, so that both see the same state of the machine. A round is ``--steps`` steps of
forward_backward and optim_step on 8 sequences of 256 random tokens at rank 32; the client submits both before it waits
for either, as a user would. Runs from a clone: the client side needs ``.venv-client`` (``make setup``).
"""

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from selfloop.cli.client_env import NO_PYTHON, find_client_python
from selfloop.control.resources.catalogue import EMBEDDED_MODEL

BENCH = Path(__file__).parent
MIB = 2**20
PATIENCE_S = 10


class Server(NamedTuple):
    """A gateway that answers: where, and how long after its launch it did."""

    url: str
    process: psutil.Process
    start_s: float


class Peer:
    """A child that does one thing per line of its input and answers with a line of JSON."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, num: int = 1) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{what} {num}\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            sys.exit(f"{self._child.args} ended with code {self._child.wait()} when asked to {what}")
        return json.loads(line)

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextmanager
def serving(data_dir: Path, key: str, *options: str) -> Generator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "selfloop.cli.main", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    command += options
    with open(data_dir / "bench-server.log", "ab") as log:
        started = time.perf_counter()
        child = subprocess.Popen(command, env={**os.environ, "SELFLOOP_API_KEY": key}, stdout=log, stderr=log)
    try:
        while not is_healthy(url):
            if child.poll() is not None:
                sys.exit(f"the server ended with code {child.returncode}; see {data_dir / 'bench-server.log'}")
            time.sleep(0.005)
        yield Server(url, psutil.Process(child.pid), time.perf_counter() - started)
    finally:
        child.terminate()
        child.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def peak_rss_bytes(process: psutil.Process) -> int:
    """The most that the process ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def worker_of(server: Server) -> psutil.Process:
    (worker,) = (child for child in server.process.children() if "selfloop.worker.process" in child.cmdline())
    return worker


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.1f}   ({min(values):.1f} to {max(values):.1f})"


def start_times(num: int) -> list[float]:
    """Seconds from launch to the first answer, each in a new data directory."""
    times: list[float] = []
    for _ in range(num):
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "key", "--no-prepare") as server:
            times.append(server.start_s)
    return times


def measure(data_dir: Path, args: argparse.Namespace) -> None:
    python = find_client_python(data_dir / "client-env")
    if python is None:
        sys.exit(f"No environment with the official client: run `make setup`. {NO_PYTHON}")
    starts = start_times(args.starts)
    key = secrets.token_urlsafe(16)
    with serving(data_dir, key) as server, ExitStack() as peers:
        idle_rss = server.process.memory_info().rss
        env = {**os.environ, "LOOPS_BASE_URL": server.url, "BASETEN_API_KEY": key, "NO_PROXY": "127.0.0.1"}
        client = Peer([python, str(BENCH / "steps_client.py")], env)
        peers.callback(client.close)
        print("Warming up (the first time the model is prepared, too) ...", flush=True)
        client.ask("steps")
        model_dir = data_dir / "models" / EMBEDDED_MODEL.replace("/", "--")
        engine = Peer([sys.executable, str(BENCH / "steps_engine.py"), str(model_dir)], dict(os.environ))
        peers.callback(engine.close)
        engine.ask("steps")

        through_client: list[float] = []
        alone: list[float] = []
        for number in range(1, args.rounds + 1):
            through_client.append(rate(client.ask("steps", args.steps)))
            alone.append(rate(engine.ask("steps", args.steps)))
            print(f"round {number}: client {through_client[-1]:.1f}, engine {alone[-1]:.1f} tokens/s", flush=True)
        empty_ms = [s * 1e3 for s in client.ask("empty", args.empty_steps)["seconds"]]
        first_token_ms = [s * 1e3 for s in client.ask("first_token", args.saves)["seconds"]]
        ratios = [a / b for a, b in zip(through_client, alone, strict=True)]

        now, peak = server.process.memory_info().rss, peak_rss_bytes(server.process)
        print(f"\n{'':40}  median   (lowest to highest)")
        for what, values in (
            ("tokens/s through the client", through_client),
            ("tokens/s of the engine alone", alone),
            ("ratio in percent, round by round", [100 * ratio for ratio in ratios]),
            ("an operation that computes nothing, ms", empty_ms),
            ("save to the first token of it, ms", first_token_ms),
            ("launch to /healthz, ms", [start_s * 1e3 for start_s in starts]),
        ):
            print(f"{what:40}{spread(values)}")
        print(
            f"gateway resident, MiB: {idle_rss / MIB:.0f} at start, {now / MIB:.0f} now, {peak / MIB:.0f} at its peak"
        )
        print(f"worker resident, MiB: {peak_rss_bytes(worker_of(server)) / MIB:.0f} at its peak")


def rate(answer: dict[str, Any]) -> float:
    return answer["num_tokens"] / answer["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--empty-steps", type=int, default=50, help="operations that compute nothing")
    parser.add_argument("--saves", type=int, default=5, help="saves that are sampled from")
    parser.add_argument("--starts", type=int, default=3, help="server starts to time")
    parser.add_argument("--data-dir", type=Path, help="default: a temporary one")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = args.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selfloop-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        measure(folder.absolute(), args)


if __name__ == "__main__":
    main()
