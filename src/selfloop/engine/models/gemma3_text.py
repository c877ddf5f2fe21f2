"""Gemma 3 (text): as Gemma 2 without caps, with norms of q and k, and a rotation of its own where a window slides."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.gemma2 import gemma_attention, gemma_decoder
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = replace(gemma_attention(config), qk_norm_eps=config.eps, norm_plus_one=True)
    every = config.size("sliding_window_pattern", default=6)
    types = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(config.num_layers)]
    window = config.window(4096)
    slides = config.windows(1, types)
    attentions = [replace(attention, window=window, rope="local") if slide else attention for slide in slides]
    return replace(
        gemma_decoder(config, attentions),
        rope=config.rope_of("full_attention", attention.head_dim, "rope_theta", 1e6),
        local_rope=config.rope_of("sliding_attention", attention.head_dim, "rope_local_base_freq", 1e4),
        logit_softcap=config.cap("final_logit_softcapping", None),
    )
