"""Where to compute, in which dtype, and how much memory to plan for."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from selfloop.engine.backends.cpu_native.instructions import has_avx512_bfloat16, has_bfloat16_tiles
from selfloop.types.errors import OperationFailed

_DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32}
NUM_STATES = 256
"""Sequences whose states memory is counted for: as many as the engine has at a time."""
NUM_KEPT_STATES = 64
"""Copies of states that the prefix cache keeps beside those, at the ends of prompts' common beginnings."""

_CPU_KV_BYTES = 256 * 2**20
_CUDA_KV_SHARE = 0.4
_CPU_BUCKET_BYTES = 384 * 2**20
_CUDA_BUCKET_SHARE = 0.1
_CPU_COPY_SHARE = 0.1
# Of what the base weights leave: a pass of training, and forwards that are kept for their backward.
_PASS_SHARE, _KEPT_SHARE = 0.25, 0.125
_LEAST_RUN_SHARE = 0.25
# Python, PyTorch and their libraries, in the fork server and in its worker.
_PROCESS_BYTES = 512 * 2**20
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def is_here(device: torch.device) -> bool:
    """Whether this machine has such a device."""
    return device.type != "cuda" or torch.cuda.is_available()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and on CPUs with instructions for it, else float32."""
    if name != "auto":
        if name not in _DTYPES:
            raise OperationFailed(f"dtype {name!r} is not supported; known: {sorted(_DTYPES)}")
        return _DTYPES[name]
    if device.type == "cuda" or has_avx512_bfloat16() or has_bfloat16_tiles():
        return torch.bfloat16
    return torch.float32


def default_train_budget(device: torch.device) -> int:
    """Tokens of a micro-batch: enough to fill the matmuls, few enough that activations stay small."""
    return 8192 if device.type == "cuda" else 512


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, and that this process may have of them.

    Nothing of what is free at the moment goes into it: a worker that starts anew must come to the same choices.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Of the groups this process is in and of those around them, in version 2 or 1; none where there are no groups."""
    limits: list[int] = []
    for line in _OWN_CGROUP.read_text().splitlines() if _OWN_CGROUP.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (_CGROUPS, "memory.max") if controllers == "" else (_CGROUPS / "memory", "memory.limit_in_bytes")
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root) and (folder / name).exists():
                text = (folder / name).read_text().strip()
                limits += [int(text)] if text != "max" else []
    return limits


def default_pass_bytes(memory_bytes: int, held_bytes: int) -> int:
    """What the activations of one pass of training may take, beside base weights of ``held_bytes``."""
    return int(max(0, memory_bytes - held_bytes) * _PASS_SHARE)


def default_kept_bytes(memory_bytes: int, held_bytes: int) -> int:
    """What forwards that wait for their backward may take, of all runs together."""
    return int(max(0, memory_bytes - held_bytes) * _KEPT_SHARE)


def run_bytes(memory_bytes: int, held_bytes: int, other_bytes: int) -> int:
    """What training runs may take: what base weights and all else leave, and a share of it where that is little.

    All else at its most comes together rarely; then the kernel ends a worker, and what was accepted is done again.
    """
    rest = memory_bytes - held_bytes
    return int(max(rest - other_bytes - _PROCESS_BYTES, rest * _LEAST_RUN_SHARE, 0))


def default_kv_tokens(token_bytes: int, context: int, device: torch.device, free_bytes: int | None = None) -> int:
    """Tokens of KV cache, at least one full context; ``free_bytes`` of a GPU is looked up where it is not given."""
    budget_bytes = _CPU_KV_BYTES
    if device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0] if free_bytes is None else free_bytes
        budget_bytes = int(free_bytes * _CUDA_KV_SHARE)
    return max(budget_bytes // token_bytes, context)


def cache_bytes(num_tokens: int, token_bytes: int, state_elements: int) -> int:
    """What a cache takes when it is full: tokens of all sequences, float32 states of as many as there are, and those
    of the prefix cache."""
    return num_tokens * token_bytes + (NUM_STATES + NUM_KEPT_STATES) * state_elements * torch.float32.itemsize


def default_bucket_tokens(token_bytes: int, device: torch.device) -> int:
    """Tokens of running samples whose keys and values lie side by side; memory is taken as it is needed."""
    budget_bytes = _CPU_BUCKET_BYTES
    if device.type == "cuda":
        budget_bytes = int(torch.cuda.mem_get_info(device)[0] * _CUDA_BUCKET_SHARE)
    return budget_bytes // token_bytes


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to compute."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def has_memory_for(num_bytes: int) -> bool:
    """Whether a copy that only makes things faster is small beside this machine's memory."""
    return num_bytes <= _CPU_COPY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps what lies between tensors that stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
