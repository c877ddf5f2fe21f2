"""Mistral: Llama without biases, and in early releases a sliding window on every layer."""

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    # An absent key means 4096 to transformers; null means none.
    config.refuse_window(config.raw.get("sliding_window", 4096))
    return config.dense(config.attention(num_kv_heads=8), config.mlp())
