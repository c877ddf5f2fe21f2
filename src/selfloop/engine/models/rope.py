"""Rotary position embedding: its scaling as data, and the inverse frequencies of each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfloop.types.errors import model_invalid


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Scaling of the rotary embedding; field names as in Hugging Face's ``rope_parameters``.

    ``head_dim`` counts the dimensions of a head that are rotated, its first ones. ``sections`` says how many pairs of
    dimensions go by time, row and column where positions are three numbers (``mrope_section``).
    """

    kind: str
    theta: float
    head_dim: int
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()


def parse_rope(
    raw: Mapping[str, Any],
    head_dim: int,
    *,
    partial: float | None = None,
    renamed: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before).

    ``partial`` is which part of a head is rotated where the config says nothing; None in families that rotate all.
    ``renamed`` are other names that a family has for kinds of scaling.

    Where both are given, ``rope_scaling`` alone counts, as in either transformers.
    """
    params: dict[str, Any] = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    kind = str(params.get("rope_type", params.get("type", "default")))
    kind = (renamed or {}).get(kind, kind)
    if kind not in _INVERSE_FREQUENCIES:
        raise model_invalid(f"rope scaling {kind!r} is not supported; known: {sorted(_INVERSE_FREQUENCIES)}")
    part = params.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0 if partial is None else partial))
    if partial is None and part != 1.0:
        raise model_invalid("partial_rotary_factor other than 1 is not supported")
    rotated_dim = int(head_dim * part)
    if not 2 <= rotated_dim <= head_dim or rotated_dim % 2 != 0:
        raise model_invalid(f"partial_rotary_factor {part!r} rotates no even number of a head's {head_dim} dimensions")
    max_position = raw["max_position_embeddings"]
    original = (
        raw.get("original_max_position_embeddings") or params.get("original_max_position_embeddings") or max_position
    )
    factor = params.get("factor")
    given: dict[str, Any] = {
        name: params[name]
        for name in ("low_freq_factor", "high_freq_factor", "attention_factor", "truncate")
        if name in params
    }
    # transformers reads an explicit null or 0 of these as "not given".
    given |= {name: params[name] for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") if params.get(name)}
    if kind == "longrope":
        given["short_factor"] = tuple(float(value) for value in params.get("short_factor") or ())
        if len(given["short_factor"]) != rotated_dim // 2 or original < 2:
            raise model_invalid(f"longrope needs {rotated_dim // 2} numbers in short_factor, and an original context")
    return RopeConfig(
        kind=kind,
        theta=float(params.get("rope_theta", raw.get("rope_theta", 10000.0))),
        head_dim=rotated_dim,
        factor=float(factor) if factor is not None else max_position / original,
        original_max_position=int(original),
        **given,
    )


def inverse_frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Frequencies (head_dim/2,) float32 and the factor on cos and sin; as transformers' ROPE_INIT_FUNCTIONS."""
    return _INVERSE_FREQUENCIES[rope.kind](rope)


def _default(rope: RopeConfig) -> tuple[Tensor, float]:
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.int64).float() / rope.head_dim
    return 1.0 / (rope.theta**exponents), 1.0


def _linear(rope: RopeConfig) -> tuple[Tensor, float]:
    return _default(rope)[0] / rope.factor, 1.0


def _llama3(rope: RopeConfig) -> tuple[Tensor, float]:
    freq = _default(rope)[0]
    low, high, context = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    wavelength = 2 * math.pi / freq
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * freq / rope.factor + smooth * freq
    scaled = torch.where(wavelength > context / low, freq / rope.factor, blended)
    return torch.where(wavelength < context / high, freq, scaled), 1.0


def _yarn(rope: RopeConfig) -> tuple[Tensor, float]:
    """https://arxiv.org/abs/2309.00071, section 3.2 and 3.4."""

    def correction_dim(rotations: float) -> float:
        span = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    freq = 1.0 / rope.theta ** (torch.arange(0, rope.head_dim, 2).float() / rope.head_dim)
    ramp = ((torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return freq / rope.factor * ramp + freq * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope(rope: RopeConfig) -> tuple[Tensor, float]:
    """https://arxiv.org/abs/2402.13753, by the factors within the original context, beyond which nothing is served."""
    freq = _default(rope)[0] / torch.tensor(rope.short_factor)
    if rope.attention_factor is not None or rope.factor <= 1:
        return freq, 1.0 if rope.attention_factor is None else rope.attention_factor
    return freq, math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))


_INVERSE_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
