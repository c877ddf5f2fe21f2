"""Programs beside a bench, in processes and environments of their own, that read commands line by line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.harness.server import Server
from selfloop.cli.client_env import NO_PYTHON, find_client_python

PEERS = Path(__file__).parents[1] / "peers"
_PATIENCE_S = 10


class Peer:
    """A child that answers each line of its input, an object with what to ``do``, with a line of JSON."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, do: str, **how: object) -> None:
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
        self.send(do, **how)
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
