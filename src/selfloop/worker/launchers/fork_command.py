"""The start of the process that loads a base model and makes workers of it: its command, output and environment."""

import asyncio
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from selfloop.types.settings import WorkerSettings
from selfloop.worker.launchers.fork_protocol import ForkServerStart
from selfloop.worker.launchers.processes import child_environment

FORK_SERVER = (sys.executable, "-m", "selfloop.worker.serving.fork_server")
# A worker's log that has grown beyond this is put aside before the next worker; one such file is kept.
_MAX_LOG_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """What a worker on this machine serves and how.

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
            env=child_environment() | {"OPENBLAS_NUM_THREADS": "1"},
        )


def put_aside_large_log(path: Path) -> None:
    """Keep a worker's log from growing without end."""
    if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
