"""Which body of the kernels this CPU runs, by the instructions that may be used.

``ONEDNN_MAX_CPU_ISA=AVX2`` or ``ATEN_CPU_CAPABILITY=avx2`` in the environment makes this machine compute as one that
has AVX2 and nothing newer, ``ATEN_CPU_CAPABILITY=default`` as one that has not even that.
"""

import platform
from typing import NamedTuple

import torch


class Body(NamedTuple):
    """One compilation of the kernels.

    Args:
        name: for people and file names.
        flags: what the compiler is told of the CPU.
        multiplies_bfloat16: rows are bfloat16 where base weights are; elsewhere they are float32 in either case.
    """

    name: str
    flags: tuple[str, ...]
    multiplies_bfloat16: bool = False


_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
AVX512_BF16 = Body("AVX512-BF16", (*_AVX512_FLAGS, "-mavx512bf16"), multiplies_bfloat16=True)
AVX512 = Body("AVX512", _AVX512_FLAGS)
AVX2 = Body("AVX2", ("-mavx2", "-mfma"))
NEON = Body("NEON", ())
GENERIC = Body("generic", ())
BODIES = (AVX512_BF16, AVX512, AVX2, NEON, GENERIC)

_WIDE = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")


def best_body() -> Body:
    """The first of :data:`BODIES` that this CPU runs."""
    if platform.machine() in ("aarch64", "arm64"):
        return NEON
    if has_avx512_bfloat16():
        return AVX512_BF16
    has, used = torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability()
    if all(has.get(name) for name in _WIDE) and used not in ("AVX2", "DEFAULT") and _onednn_computes_bfloat16():
        return AVX512
    return AVX2 if has.get("avx2") and has.get("fma3") and used != "DEFAULT" else GENERIC


def has_avx512_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported()) and _onednn_computes_bfloat16()


def has_bfloat16_tiles() -> bool:
    return bool(torch.cpu._is_amx_tile_supported()) and _onednn_computes_bfloat16()


def _onednn_computes_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
