"""Qwen2 and Qwen2.5: biases on q, k and v."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = config.attention(qkv_bias=True, num_kv_heads=32)
    return config.decoder([replace(attention, window=window) for window in config.qwen_windows()], config.mlp())
