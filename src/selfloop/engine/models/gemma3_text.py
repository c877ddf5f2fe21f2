"""Gemma 3 (text): as Gemma 2 without caps, with norms of q and k, and a rotation of its own where a window slides."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.gemma2 import gemma_attention, gemma_decoder
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    plain = gemma_attention(config)
    attention = replace(plain, qk_norm_eps=config.eps, norm_plus_one=True, softcap=None)
    every = config.size("sliding_window_pattern", default=6)
    types = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(config.num_layers)]
    slides = config.windows(1, types)
    window = config.window(4096)
    attentions = [replace(attention, window=window, rope="local") if slide else attention for slide in slides]
    spec = gemma_decoder(config, attentions)
    return replace(
        spec,
        rope=config.rope(_rope(config.raw, "full_attention", "rope_theta", 1e6), plain.head_dim),
        local_rope=config.rope(_rope(config.raw, "sliding_attention", "rope_local_base_freq", 1e4), plain.head_dim),
        logit_softcap=config.cap("final_logit_softcapping", None),
    )


def _rope(raw: Mapping[str, Any], kind: str, base: str, default: float) -> dict[str, Any]:
    """transformers 5 has parameters for each kind of layer; before, a scaling was that of the full ones."""
    of_kinds: Any = raw.get("rope_parameters")
    own: Any = of_kinds.get(kind) if isinstance(of_kinds, dict) else None
    scaling: Any = raw.get("rope_scaling") if kind == "full_attention" else None
    return {"rope_theta": raw.get(base, default), **(own or {}), **(scaling or {})}
