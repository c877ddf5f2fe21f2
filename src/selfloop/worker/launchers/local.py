"""Start processes of the heavy half on this machine."""

import asyncio
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from selfloop.types.settings import WorkerSettings
from selfloop.worker.launchers.fork_protocol import ForkServerStart

# Names of variables whose values a process of numbers has no use for.
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|DATABASE_URL|OTLP.*HEADERS", re.IGNORECASE)
_HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
FORK_SERVER = (sys.executable, "-m", "selfloop.worker.serving.fork_server")
# A worker's log that has grown beyond this is put aside before the next worker; one such file is kept.
_MAX_LOG_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """What a worker serves and how.

    Args:
        model_dir: a prepared model folder.
        log_path: where the process's output goes.
        settings: as it is started with.
        record_path: where the next gateway finds the loaded model if this one dies; None: it is loaded again.
        owner: the data directory that the loaded model is kept for: which one it is, and where it lies.
        roots: where the roots of what it reads and writes lie.
    """

    model_dir: Path
    log_path: Path
    settings: WorkerSettings = WorkerSettings()  # noqa: RUF009 - frozen
    record_path: Path | None = None
    owner: str = ""
    roots: Mapping[str, Path] = field(default_factory=dict[str, Path])

    @property
    def start_message(self) -> str:
        """What the process that loads the model is started with: a :class:`ForkServerStart`."""
        # One that nobody can find need not wait for anybody.
        linger_s = 0.0 if self.record_path is None else self.settings.keep_loaded_s
        record = None if self.record_path is None else str(self.record_path)
        start = ForkServerStart(str(self.model_dir), self.settings.engine, linger_s, record)
        return msgspec.json.encode(start).decode()


async def launch_fork_server(command: WorkerCommand, listener: socket.socket) -> asyncio.subprocess.Process:
    """Launch the process that loads a base model, makes workers of it, and hears whoever connects to ``listener``."""
    command.log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log_path, "ab") as log:  # noqa: ASYNC230 - one open at launch
        return await asyncio.create_subprocess_exec(
            *FORK_SERVER,
            str(listener.fileno()),
            command.start_message,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            # A Ctrl-C in the terminal is for the gateway, which stops its workers in order.
            start_new_session=True,
            # The fork server has one thread; what threads a library would start is not for us.
            env=_environment() | {"OPENBLAS_NUM_THREADS": "1"},
        )


def put_aside_large_log(path: Path) -> None:
    """Keep a worker's log from growing without end."""
    if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))


async def launch_prepare(*arguments: str) -> asyncio.subprocess.Process:
    """Launch the program that turns a model source into a served folder; progress on its stdout."""
    return await _launch_subprocess("selfloop.convert.prepare", *arguments, keep=_HUB_SECRETS)


async def launch_adapters(*arguments: str) -> asyncio.subprocess.Process:
    """Launch the program that takes adapters out of checkpoints and into them; progress on its stdout."""
    return await _launch_subprocess("selfloop.convert.adapters", *arguments)


async def _launch_subprocess(module: str, *arguments: str, keep: Sequence[str] = ()) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(keep),
    )


def _environment(keep: Sequence[str] = ()) -> dict[str, str]:
    """Our environment less its secrets but those to ``keep``, with the process's memory and waiting kept in check."""
    environment = {k: v for k, v in os.environ.items() if k in keep or not _SECRET_NAME.search(k)}
    # glibc otherwise keeps an arena per thread, which costs hundreds of MB in a process of large tensors.
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    # By default an idle OpenMP thread spins for so long that a busy neighbour on the core costs us 90% of our speed.
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    environment["PYTHONUNBUFFERED"] = "1"
    return environment
