"""Start worker processes on this machine."""

import asyncio
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Names of variables whose values a process of numbers has no use for.
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|DATABASE_URL|OTLP.*HEADERS", re.IGNORECASE)
_HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
# A worker's log that has grown beyond this is put aside at the next launch; one such file is kept.
_MAX_LOG_BYTES = 32 * 1024 * 1024

DEFAULT_TRAINING_SHARE = 0.5


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


async def launch_worker(
    command: WorkerCommand, address: str, pulse_address: str, begun_path: Path
) -> asyncio.subprocess.Process:
    """Launch a worker that connects to both addresses and dies with this process.

    Args:
        begun_path: a file that it keeps the tickets of begun operations in, separated by spaces, up to a line's end.
    """
    arguments = [
        sys.executable,
        "-m",
        "selfloop.worker.process",
        "--address",
        address,
        "--pulse-address",
        pulse_address,
        "--begun-file",
        str(begun_path),
        "--model-dir",
        str(command.model_dir),
        "--device",
        command.device,
        "--dtype",
        command.dtype,
        "--training-share",
        str(command.training_share),
        "--parent-pid",
        str(os.getpid()),
    ]
    if command.deterministic:
        arguments.append("--deterministic")
    for option, value in (
        ("--num-threads", command.num_threads),
        ("--activation-bytes", command.activation_bytes),
        ("--kept-bytes", command.kept_bytes),
    ):
        if value is not None:
            arguments += [option, str(value)]
    command.log_path.parent.mkdir(parents=True, exist_ok=True)
    if command.log_path.exists() and command.log_path.stat().st_size > _MAX_LOG_BYTES:
        command.log_path.replace(command.log_path.with_suffix(".log.1"))
    with open(command.log_path, "ab") as log:  # noqa: ASYNC230 - one open at launch
        return await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A Ctrl-C in the terminal is for the gateway, which stops its workers in order.
            start_new_session=True,
            env=_environment(),
        )


async def launch_prepare(*arguments: str) -> asyncio.subprocess.Process:
    """Launch the program that turns a model source into a served folder; progress on its stdout."""
    return await _launch_program("selfloop.worker.prepare", *arguments, keep=_HUB_SECRETS)


async def launch_adapters(*arguments: str) -> asyncio.subprocess.Process:
    """Launch the program that takes adapters out of checkpoints and into them; progress on its stdout."""
    return await _launch_program("selfloop.worker.adapters", *arguments)


async def _launch_program(module: str, *arguments: str, keep: Sequence[str] = ()) -> asyncio.subprocess.Process:
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
