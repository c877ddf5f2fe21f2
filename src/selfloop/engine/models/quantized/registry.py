"""Quantised weights made plain: of each format a file here, with ``dequantized(parts, of)``.

Where a format is one that base weights are kept in (:mod:`selfloop.engine.models.quantized.codes`), ``codes`` gives the
stored numbers as they are.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from selfloop.engine.models.quantized import awq, bitsandbytes, fp8, gptq, mxfp4
from selfloop.engine.models.quantized.codes import Codes
from selfloop.types.quantization import Quantization
from selfloop.types.settings import KeptAs

_FORMATS: dict[str, Callable[[Mapping[str, Tensor], Quantization], Tensor]] = {
    "fp8": fp8.dequantized,
    "mxfp4": mxfp4.dequantized,
    "gptq": gptq.dequantized,
    "awq": awq.dequantized,
    "bitsandbytes": bitsandbytes.dequantized,
}
_CODES: dict[str, Callable[[Mapping[str, Tensor], Quantization, KeptAs], Codes | None]] = {
    "fp8": fp8.codes,
    "bitsandbytes": bitsandbytes.codes,
}


def dequantized(parts: Mapping[str, Tensor], of: Quantization) -> Tensor:
    """float32 weight of its stored parts, by role, whose shapes :mod:`selfloop.types.quantization` has checked."""
    return _FORMATS[of.method](parts, of)


def codes(parts: Mapping[str, Tensor], of: Quantization, kept_as: KeptAs) -> Codes | None:
    """The stored numbers in the form that base weights are kept in; None where they are of another form."""
    read = _CODES.get(of.method)
    return None if read is None else read(parts, of, kept_as)
