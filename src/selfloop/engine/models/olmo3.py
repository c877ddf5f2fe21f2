"""OLMo 3: OLMo 2 with windows in three of four layers, whose rotation is not scaled."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.olmo2 import olmo_attention, olmo_decoder
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = olmo_attention(config)
    types = ["sliding_attention" if (index + 1) % 4 else "full_attention" for index in range(config.num_layers)]
    window = config.window(4096)
    slides = config.windows(1, types)
    attentions = [replace(attention, window=window, rope="local") if slide else attention for slide in slides]
    # transformers reads no older key for the base of the sliding ones.
    return replace(
        olmo_decoder(config, attentions, config.rope_of("full_attention", attention.head_dim, "rope_theta", 5e5)),
        local_rope=config.rope_of("sliding_attention", attention.head_dim, "", 5e5),
    )
