"""A real server for tests: a process of its own on a free port, with a data directory and a tiny model of its own."""

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from selfloop.testing.orders import Orders
from selfloop.testing.tiny_model import make_tiny_model
from selfloop.types.client_variables import client_variables

TINY_MODEL = "selfloop/tiny"
"""The name of the model that a server has unless it is given another."""

READY = "ready"
"""The line that the server's process writes when it listens."""

_STOP_TIMEOUT_S = 20.0
_LOG_TAIL_BYTES = 4000


class ServerFailed(Exception):
    """The server did not start, or has ended; the text has the end of its log."""


class Server:
    """A server that runs; made by :func:`server` or :meth:`start`.

    Attributes:
        url: ``http://127.0.0.1:<port>``.
        api_key: a key of the default team.
        model: the name of its base model.
        model_folder: the files of that model.
        data_dir: goes with the server, unless it was given.
    """

    def __init__(self, data_dir: Path, model_folder: Path, model: str, port: int, api_key: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.api_key = api_key
        self.model = model
        self.model_folder = model_folder
        self.data_dir = data_dir
        self._port = port
        self._log_path = data_dir.with_name(data_dir.name + ".log")
        self._orders = Orders(data_dir)
        self._process: subprocess.Popen[str] | None = None

    @property
    def env(self) -> dict[str, str]:
        """Variables of a script that is to use this server, with either client; the caller's own come before them."""
        return client_environment(self.url, self.api_key)

    @property
    def log(self) -> str:
        """What the server and its workers wrote."""
        files = [self._log_path, *sorted((self.data_dir / "logs").glob("*.log"))]
        return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())

    def start(self) -> "Server":
        """Start the process and wait until it answers. Raises :class:`ServerFailed` if it ends instead."""
        arguments = [str(self.data_dir), str(self._port), str(self.model_folder), self.model]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "selfloop.testing.serve", *arguments],
                env=_own_environment() | {"SELFLOOP_API_KEY": self.api_key},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Ctrl-C is the test's, which closes the server then.
                start_new_session=True,
            )
        if not _says_ready(self._process.stdout):
            status = self._process.wait()
            raise ServerFailed(f"the server ended with status {status}:\n{self.log[-_LOG_TAIL_BYTES:]}")
        return self

    def loops_client(self, **options: Any) -> Any:
        """A ``baseten.loops.ServiceClient`` of this server. Raises ImportError where ``baseten-loops`` is missing."""
        from baseten.loops import ServiceClient  # pyright: ignore[reportMissingImports]

        return ServiceClient(base_url=self.url, api_key=self.api_key, **options)

    def tinker_client(self, **options: Any) -> Any:
        """A ``tinker.ServiceClient`` of this server. Raises ImportError where ``tinker`` is missing."""
        from tinker import ServiceClient  # pyright: ignore[reportMissingImports]

        return ServiceClient(base_url=self.url, api_key=f"tml-{self.api_key}", **options)

    def client(self) -> Any:
        """The service client of what is installed: Loops', or else Tinker's. Raises ImportError without either."""
        has_loops = importlib.util.find_spec("baseten") and importlib.util.find_spec("baseten.loops")
        return self.loops_client() if has_loops else self.tinker_client()

    def tokenizer(self) -> Any:
        """The model's tokenizer, read from its folder: a ``transformers`` one."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_folder, trust_remote_code=False)

    def kill_worker(self, *, at_step: int | None = None) -> None:
        """Kill the worker, as a crash or the kernel would. The server starts another, and nothing accepted is lost.

        Args:
            at_step: when the worker is sent the ``at_step``-th optimizer step from now on; None kills it now.

        Raises:
            ValueError: ``at_step`` is below 1, or there is no worker to kill now (the first operation starts one).
        """
        if at_step is not None:
            if at_step < 1:
                raise ValueError(f"at_step: 1 or more, got {at_step}")
            self._orders.kill_after(at_step)
        elif not self._orders.kill_now():
            raise ValueError("no worker runs: the first operation or sample starts one")

    def close(self) -> None:
        """End the server and its workers. Again is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def server(
    *, model: Path | None = None, name: str = TINY_MODEL, port: int | None = None, api_key: str | None = None
) -> Generator[Server]:
    """A server for the length of a block: ``with selfloop.testing.server() as s: ...``.

    Everything that it stores is in a temporary folder, which goes with it. It computes on the CPU in float32, with one
    thread and ``--deterministic``: the same script gives the same numbers.

    Args:
        model: a Hugging Face folder to serve; None makes a random model of a few kilobytes (:func:`make_tiny_model`).
        name: what scripts call the model, for example the name of the large one that they train.
        port: None takes a free one.
        api_key: None makes one.

    Raises:
        ServerFailed: it did not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="selfloop-testing-"))
    made = Server(
        folder / "data",
        model or make_tiny_model(folder / "model"),
        name,
        free_port() if port is None else port,
        api_key or secrets.token_urlsafe(24),
    )
    try:
        yield made.start()
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def client_environment(url: str, api_key: str) -> dict[str, str]:
    """What the clients of both services read, and what keeps them from telling anybody else."""
    return client_variables(url, api_key) | {"TINKER_TELEMETRY": "0", "WANDB_MODE": "disabled"}


def free_port() -> int:
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own_environment() -> dict[str, str]:
    """Without options of another server, and without a threading of libraries that fights with the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SELFLOOP_")}
    return kept | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _says_ready(output: IO[str] | None) -> bool:
    assert output is not None
    return any(line.strip() == READY for line in output)
