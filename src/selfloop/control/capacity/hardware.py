"""What this machine is and has; what is taken of it just now is :mod:`selfloop.control.observe.processes`."""

import functools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

INSTANCE_TYPE_ID = "local"
NODE = "local"
"""The name of the only node."""
CPU = "CPU"
"""How the accelerator of a machine without GPUs, or of a server that may not use them, is called."""

# The names that the clients know for GPUs, as they stand in the driver's names: "NVIDIA H100 80GB HBM3".
_ACCELERATOR = re.compile(r"\b(T4|L4|L40S?|A10G?|V100|A100|H100|H200|B200|B300|GB200|GB300)\b")
_NVIDIA_SMI_S = 10.0
_PACKAGES = ("selfloop", "torch", "transformers", "tokenizers", "safetensors", "llguidance", "sqlalchemy", "pyzmq")


@dataclass(frozen=True, slots=True)
class Hardware:
    """``gpu_type`` is the driver's name of the first GPU, None without one."""

    cpus: int
    memory_bytes: int
    gpu_count: int
    gpu_type: str | None
    gpu_memory_mib: int | None = None

    @property
    def accelerator(self) -> str:
        """The short name of the GPUs: ``H100``; the driver's name where there is none; ``CPU`` without any."""
        if self.gpu_type is None:
            return CPU
        known = _ACCELERATOR.search(self.gpu_type)
        return known[1] if known else self.gpu_type


@functools.cache
def this_hardware() -> Hardware:
    gpus = [path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    model = re.search(r"^Model:\s*(.+)$", gpus[0], re.MULTILINE) if gpus else None
    memory = _gpu_memory_mib() if gpus else None
    name = model[1].strip() if model else None
    return Hardware(os.cpu_count() or 1, psutil.virtual_memory().total, len(gpus), name, memory)


def _gpu_memory_mib() -> int | None:
    """Memory of the first GPU, None where the driver's own tool does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
        return int(said.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


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
    disk, memory, own = shutil.disk_usage(data_dir), psutil.virtual_memory(), this_hardware()
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
