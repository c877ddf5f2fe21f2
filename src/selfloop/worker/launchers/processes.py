"""Processes of this machine: distinguished though their numbers are given again, their sockets and environment."""

import contextlib
import os
import re
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STARTED_FIELD = 19
"""Of ``/proc/<pid>/stat``, counted behind the command's name."""
# What the kernel takes as a path of a local socket, less our longest name and the folder's own.
_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_NAME = "/worker.sock"
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# Names of variables whose values a process of numbers has no use for.
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|DATABASE_URL|OTLP.*HEADERS", re.IGNORECASE)


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process and no other.

    Args:
        started: when, in clock ticks since the machine was booted.
        boot: which boot of which machine.
    """

    pid: int
    started: int
    boot: str


def boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has the number now; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessIdentity(pid, int(fields[_STARTED_FIELD]), boot_id())


def open_process(pid: int) -> int | None:
    """A descriptor of the process that has the number now, to be closed; None where there is none."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def open_exactly(process: ProcessIdentity) -> int | None:
    """A descriptor of that very process, to be closed; None once it has ended."""
    if identify(process.pid) != process:
        return None
    descriptor = open_process(process.pid)
    # It may have ended, and its number been given again, in between.
    if descriptor is not None and identify(process.pid) != process:
        os.close(descriptor)
        return None
    return descriptor


def kill(descriptor: int | None) -> None:
    """``kill -9`` of a process by its descriptor; one that has ended is fine."""
    if descriptor is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def make_socket_folder() -> Path:
    """A new folder of mode 0700 for sockets.

    It is a temporary one, as the path of a data directory may be too long for a socket. So may that of ``TMPDIR``: then
    it is made elsewhere.
    """
    for parent in (None, *_SHORT_FOLDERS):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="selfloop-", dir=parent)
            if len(os.fsencode(folder + _LONGEST_NAME)) <= _MAX_SOCKET_PATH_BYTES:
                return Path(folder)
            os.rmdir(folder)
    raise OSError(f"no folder for sockets: {tempfile.gettempdir()} is too long a path, {_SHORT_FOLDERS} cannot be used")


def child_environment(keep: Sequence[str] = ()) -> dict[str, str]:
    """Our environment less its secrets but those to ``keep``, with the process's memory and waiting kept in check."""
    environment = {k: v for k, v in os.environ.items() if k in keep or not _SECRET_NAME.search(k)}
    # glibc otherwise keeps an arena per thread, which costs hundreds of MB in a process of large tensors.
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    # By default an idle OpenMP thread spins for so long that a busy neighbour on the core costs us 90% of our speed.
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    environment["PYTHONUNBUFFERED"] = "1"
    return environment
