"""Start processes of the heavy half on this machine."""

import asyncio
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Names of variables whose values a process of numbers has no use for.
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|DATABASE_URL|OTLP.*HEADERS", re.IGNORECASE)
_HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
# A worker's log that has grown beyond this is put aside before the next worker; one such file is kept.
_MAX_LOG_BYTES = 32 * 1024 * 1024

DEFAULT_TRAINING_SHARE = 0.5
DEFAULT_KEEP_LOADED_S = 60.0


@dataclass(frozen=True, slots=True)
class WorkerCommand:
    """What a worker serves and how.

    Args:
        model_dir: a prepared model folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        log_path: where the process's output goes.
        num_threads: CPU threads of the engine; None takes every core.
        silence_s: a worker that its gateway has heard nothing of for so long is ended: it is stopped or stuck.
        stuck_s: so is one whose main loop has been at one piece of work for so long.
        training_share: part of the device's time that training gets while there is sampling to do, too.
        deterministic: a run's training gives the same bits whatever is computed together with it.
        activation_bytes: what one pass of training may take; None leaves it to the engine.
        kept_bytes: what forwards that wait for their backward may take; None leaves it to the engine.
        memory_bytes: what all of it may take; None is what the machine, or the control group, has.
        record_path: where the next gateway finds the loaded model if this one dies; None: it is loaded again.
        linger_s: how long it then waits in memory.
        owner: the data directory that the loaded model is kept for: which one it is, and where it lies.
        roots: where the roots of what it reads and writes lie.
    """

    model_dir: Path
    device: str
    dtype: str
    log_path: Path
    num_threads: int | None = None
    silence_s: float = 60.0
    stuck_s: float = 3600.0
    training_share: float = DEFAULT_TRAINING_SHARE
    deterministic: bool = False
    activation_bytes: int | None = None
    kept_bytes: int | None = None
    memory_bytes: int | None = None
    record_path: Path | None = None
    linger_s: float = 0.0
    owner: str = ""
    roots: Mapping[str, Path] = field(default_factory=dict[str, Path])


async def launch_fork_server(command: WorkerCommand, listener: socket.socket) -> asyncio.subprocess.Process:
    """Launch the process that loads a base model, makes workers of it, and hears whoever connects to ``listener``."""
    command.log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log_path, "ab") as log:  # noqa: ASYNC230 - one open at launch
        return await asyncio.create_subprocess_exec(
            *fork_server_arguments(command),
            "--listener-fd",
            str(listener.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            # A Ctrl-C in the terminal is for the gateway, which stops its workers in order.
            start_new_session=True,
            # The fork server has one thread; what threads a library would start is not for us.
            env=_environment() | {"OPENBLAS_NUM_THREADS": "1"},
        )


def fork_server_arguments(command: WorkerCommand) -> list[str]:
    """The command line of a host, which says all that it was loaded with."""
    arguments = [
        sys.executable,
        "-m",
        "selfloop.worker.serving.fork_server",
        "--model-dir",
        str(command.model_dir),
        "--device",
        command.device,
        "--dtype",
        command.dtype,
        "--linger-s",
        str(command.linger_s),
    ]
    if command.record_path is not None:
        arguments += ["--record", str(command.record_path)]
    if command.deterministic:
        arguments.append("--deterministic")
    for option, value in (
        ("--num-threads", command.num_threads),
        ("--activation-bytes", command.activation_bytes),
        ("--kept-bytes", command.kept_bytes),
        ("--memory-bytes", command.memory_bytes),
    ):
        if value is not None:
            arguments += [option, str(value)]
    return arguments


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
