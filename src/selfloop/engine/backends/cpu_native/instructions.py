"""Which instructions of this CPU may be used.

``ONEDNN_MAX_CPU_ISA=AVX2`` in the environment makes this machine compute as one that has AVX2 and nothing newer.
"""

import torch


def has_avx512_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported()) and _onednn_computes_bfloat16()


def has_bfloat16_tiles() -> bool:
    return bool(torch.cpu._is_amx_tile_supported()) and _onednn_computes_bfloat16()


def _onednn_computes_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
