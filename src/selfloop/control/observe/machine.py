"""Looks at this machine: what a worker's processes take, the disk, the GPUs if NVIDIA's library is there."""

import importlib
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from selfloop.control.machine import this_machine
from selfloop.control.observe.meter import Usage

NODE = "local"
"""The name of the only node."""

_PACKAGES = ("selfloop", "torch", "transformers", "tokenizers", "safetensors", "llguidance", "sqlalchemy", "pyzmq")


class Machine:
    """Blocking calls, for a thread. CPU is what was used since the last look at the same process."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._last: dict[int, tuple[float, float]] = {}
        self._nvml = _open_nvml()

    def look(self, pids: set[int]) -> dict[int, Usage]:
        """What each process takes with its children; processes that are gone are left out."""
        self._last = {pid: last for pid, last in self._last.items() if pid in pids}
        disk = shutil.disk_usage(self._data_dir)
        gpus = self._gpus() if pids else {}
        found: dict[int, Usage] = {}
        for pid in pids:
            try:
                root = psutil.Process(pid)
                cpu_s, memory_bytes = 0.0, 0
                for process in [root, *root.children(recursive=True)]:
                    with process.oneshot():
                        times = process.cpu_times()
                        cpu_s += times.user + times.system
                        memory_bytes += process.memory_info().rss
                started = root.create_time()
            except psutil.NoSuchProcess:
                continue
            now = time.time()
            then, before_s = self._last.get(pid, (started, 0.0))
            self._last[pid] = (now, cpu_s)
            cores = max(cpu_s - before_s, 0.0) / max(now - then, 0.001)
            found[pid] = Usage(cores, memory_bytes, disk.used, disk.total, gpus)
        return found

    def _gpus(self) -> dict[int, tuple[int, float]]:
        if self._nvml is None:
            return {}
        nvml = self._nvml
        found: dict[int, tuple[int, float]] = {}
        try:
            for index in range(int(nvml.nvmlDeviceGetCount())):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                rates = nvml.nvmlDeviceGetUtilizationRates(handle)
                found[index] = (int(memory.used), float(rates.gpu) / 100)
        except nvml.NVMLError:
            return {}
        return found


def _open_nvml() -> Any:
    """NVIDIA's management library, if its Python package and the driver are there."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def resident_bytes(pids: set[int]) -> int:
    total = 0
    for pid in pids:
        try:
            total += psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def versions() -> dict[str, str | None]:
    """Python's and the packages' versions, None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def facts(data_dir: Path) -> dict[str, str | int | None]:
    """What the machine is; no names of users or hosts."""
    disk, memory, own = shutil.disk_usage(data_dir), psutil.virtual_memory(), this_machine()
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "num_cpus": own.cpus,
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_total_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "gpu_count": own.gpu_count,
        "gpu_type": own.gpu_type,
        "gpu_memory_mib": own.gpu_memory_mib,
    }
