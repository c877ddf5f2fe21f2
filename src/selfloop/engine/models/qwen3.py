"""Qwen3: RMSNorm on every head of q and k before the rotation."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, o_bias=bias, qk_norm=True, num_kv_heads=32, head_dim=128)
    return config.decoder([replace(attention, window=window) for window in config.qwen_windows()], config.mlp())
