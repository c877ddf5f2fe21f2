"""What a worker's processes take at this moment, and the disk, and the GPUs if NVIDIA's library is there."""

import importlib
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from selfloop.control.observe.meter import Usage


class Processes:
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
