"""SmolLM3: Llama with layers that are not rotated, a quarter of them where the config says nothing else."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.errors import model_invalid


def spec(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, o_bias=bias, num_kv_heads=4)
    rotates = config.raw.get("no_rope_layers")  # which says 1 of a layer that is rotated
    if rotates is None:
        every = config.size("no_rope_layer_interval", default=4)
        rotates = [int((index + 1) % every != 0) for index in range(config.num_layers)]
    if not isinstance(rotates, list) or len(rotates) != config.num_layers:
        raise model_invalid(f"config.json: no_rope_layers must have a number for each layer, is {rotates!r}")
    window = config.window() if config.flag("use_sliding_window") else None
    windows = config.windows(window, ["full_attention" if rotate else "sliding_attention" for rotate in rotates])
    each = zip(rotates, windows, strict=True)
    attentions = [replace(attention, rope="model" if rotate else None, window=window) for rotate, window in each]
    return config.decoder(attentions, config.mlp(bias=config.flag("mlp_bias")))
