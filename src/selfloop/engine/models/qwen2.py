"""Qwen2 and Qwen2.5: biases on q, k and v."""

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    config.refuse_window(config.qwen_window())
    return config.dense(config.attention(qkv_bias=True, num_kv_heads=32), config.mlp())
