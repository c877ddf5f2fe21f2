"""Mistral: Llama without biases, and in early releases a sliding window on every layer."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    # An absent key means 4096 to transformers; null means none.
    attention = replace(config.attention(num_kv_heads=8), window=config.window(4096))
    return config.dense(attention, config.mlp())
