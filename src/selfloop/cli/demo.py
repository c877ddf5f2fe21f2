"""``selfloop demo``: a server, the official client and the quickstart script, in one go."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
from rich.console import Console

from selfloop.cli import client_env
from selfloop.types.client_variables import client_variables

EXAMPLES = client_env.carried("examples/quickstart.py").parent

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.1
_LOG_TAIL_LINES = 30

# What would send the script elsewhere than to the demo's own server.
_DROPPED = ("HF_HUB_OFFLINE", "HF_TOKEN", "PYTHONPATH", "TRANSFORMERS_OFFLINE", "LOOPS_TEAM")


class DemoFailed(Exception):
    """The demo cannot continue; the text is the reason and what to do."""


def run_demo(data_dir: Path, base_model: str | None = None, steps: int | None = None) -> int:
    """Train the example's adapter from nothing; returns the exit code of the script.

    Args:
        data_dir: of the server; the client's environment and the downloaded adapter go there, too.
        base_model: None takes the script's default. ``steps`` likewise.
    """
    console = Console()
    data_dir = data_dir.expanduser().absolute()
    try:
        with _sigterm_as_exit():
            return _run(console, data_dir, base_model, steps)
    except DemoFailed as failure:
        console.print(str(failure), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


def _run(console: Console, data_dir: Path, base_model: str | None, steps: int | None) -> int:
    script = EXAMPLES / "quickstart.py"
    if not script.is_file():
        raise DemoFailed(f"{script} is not here: reinstall selfloop, or run it from a whole clone.")
    log_file = data_dir / "logs" / "demo-server.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    url, key = f"http://127.0.0.1:{_free_port()}", secrets.token_urlsafe(24)
    with _server(_serve_command(url, data_dir), key, log_file) as server:
        python = client_python(data_dir, console)
        with console.status("Starting the server"):
            _wait_until_healthy(url, server, log_file)
        console.print(f"Server on {url}, client in {python}\n", highlight=False)
        command = [python, str(script), "--out", str(data_dir / "demo-adapter")]
        command += ["--base-model", base_model] if base_model is not None else []
        command += ["--steps", str(steps)] if steps is not None else []
        code = _run_script(command, client_environment(os.environ, url, key, data_dir), server, log_file)
    if code != 0:
        console.print(f"[red]The script ended with code {code}. The server's last words:[/red]\n")
        console.print(_tail(log_file), highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(_how_to_go_on(data_dir, python, script), highlight=False, markup=False, soft_wrap=True)
    return code


def client_python(data_dir: Path, console: Console) -> str:
    """A Python that has the official client; an environment is made below ``data_dir`` if there is none yet."""
    environment = data_dir / "client-env"
    python = client_env.find_client_python(environment)
    if python is not None:
        return python
    base = next(client_env.newer_pythons(), None)
    if base is None:
        raise DemoFailed(client_env.NO_PYTHON)
    with console.status(f"Installing {client_env.CLIENT_PACKAGE} into {environment} (once)"):
        try:
            client_env.make_environment(environment, base)
        except client_env.ClientEnvironmentFailed as failure:
            raise DemoFailed(str(failure)) from failure
    return str(client_env.python_of(environment))


def client_environment(environ: Mapping[str, str], url: str, key: str, data_dir: Path) -> dict[str, str]:
    """Environment of the script: the user's own, pointed at the demo's server and nowhere else."""
    kept = {name: value for name, value in environ.items() if name not in _DROPPED and "_REUSE_FROM_" not in name}
    no_proxy = ",".join(part for part in (environ.get("NO_PROXY", environ.get("no_proxy", "")), "127.0.0.1") if part)
    return {
        **kept,
        **client_variables(url, key),
        "HF_HOME": str(data_dir / "client-hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "disabled",
    }


def _serve_command(url: str, data_dir: Path) -> list[str]:
    port = url.rpartition(":")[2]
    return [sys.executable, "-m", "selfloop.cli.main", "serve", "--port", port, "--data-dir", str(data_dir)]


@contextmanager
def _server(command: list[str], key: str, log_file: Path) -> Generator[subprocess.Popen[bytes], None, None]:
    """The server as a child, in a session of its own: Ctrl-C reaches the script, the server ends after."""
    with log_file.open("wb") as log:
        server = subprocess.Popen(
            command,
            env={**os.environ, "SELFLOOP_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        _stop(server)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            _check_alive(server, log_file)
            try:
                if client.get(f"{url}/healthz").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(_POLL_S)
    raise DemoFailed(f"The server was not ready after {_START_TIMEOUT_S:.0f} s. Its log:\n{_tail(log_file)}")


def _run_script(command: list[str], env: dict[str, str], server: subprocess.Popen[bytes], log_file: Path) -> int:
    """Run the script on our terminal. Without its server it would retry for minutes, so it ends with it."""
    script = subprocess.Popen(command, env=env)
    try:
        while (code := script.poll()) is None:
            _check_alive(server, log_file)
            time.sleep(_POLL_S)
        return code if code >= 0 else 128 - code
    finally:
        _stop(script)


def _check_alive(server: subprocess.Popen[bytes], log_file: Path) -> None:
    if server.poll() is not None:
        raise DemoFailed(f"The server ended with code {server.returncode}. Its log:\n{_tail(log_file)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: no more patience
        process.kill()
        process.wait()


@contextmanager
def _sigterm_as_exit() -> Generator[None, None, None]:
    """SIGTERM unwinds like Ctrl-C does, so that no server is left behind."""

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log_file: Path) -> str:
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def _how_to_go_on(data_dir: Path, python: str, script: Path) -> str:
    return f"""
The adapter is in {data_dir / "demo-adapter"}, everything the server keeps in {data_dir}.

To go on, start a server:
    SELFLOOP_API_KEY=<a key you choose> selfloop serve --data-dir {data_dir}

and in another shell run any Loops script against it:
    export LOOPS_BASE_URL=http://127.0.0.1:8000
    export BASETEN_API_KEY=<that key>
    export HF_ENDPOINT=http://127.0.0.1:8000/hf
    {python} {script}
"""
