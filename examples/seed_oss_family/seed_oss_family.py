"""Seed-OSS: attention with biases on q, k and v, and none on its output."""

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = config.attention(qkv_bias=config.flag("attention_bias"), o_bias=config.flag("attention_out_bias"))
    return config.dense(attention, config.mlp(bias=config.flag("mlp_bias")))
