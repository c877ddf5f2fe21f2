"""Whether the kernel ends processes for want of memory."""

from pathlib import Path

_OWN, _GROUPS, _MACHINE = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/vmstat")


def num_kernel_kills() -> int:
    """Processes that were ended so far, on the machine or in our control group (version 2 or 1); only its rise counts.

    Workers are in the group of the gateway that started them.
    """
    files = [_MACHINE]
    for line in _OWN.read_text().splitlines() if _OWN.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.append(_GROUPS / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(_GROUPS / "memory" / path.lstrip("/") / "memory.oom_control")
    return sum(_counted(file) for file in files)


def _counted(file: Path) -> int:
    try:
        words = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0  # Not there, or not ours to read.
    return sum(int(value) for name, value in words if name == "oom_kill")


def be_ended_first(path: Path = Path("/proc/self/oom_score_adj")) -> None:
    """Have the kernel end this process and what it forks before the gateway, which has what was accepted."""
    try:
        if int(path.read_text()) < _ADJUSTMENT:
            path.write_text(str(_ADJUSTMENT))
    except OSError:
        pass  # Not Linux: then nobody is ended so.


_ADJUSTMENT = 500
