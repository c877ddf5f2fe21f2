"""Quantised weights made plain: of each format a file here, with ``dequantized(parts, of)``."""

from collections.abc import Callable, Mapping

from torch import Tensor

from selfloop.engine.models.quantized import awq, bitsandbytes, fp8, gptq, mxfp4
from selfloop.types.quantization import Quantization

_FORMATS: dict[str, Callable[[Mapping[str, Tensor], Quantization], Tensor]] = {
    "fp8": fp8.dequantized,
    "mxfp4": mxfp4.dequantized,
    "gptq": gptq.dequantized,
    "awq": awq.dequantized,
    "bitsandbytes": bitsandbytes.dequantized,
}


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """float32 weight of its stored parts, by role, whose shapes :mod:`selfloop.types.quantization` has checked."""
    return _FORMATS[of.method](parts, of)
