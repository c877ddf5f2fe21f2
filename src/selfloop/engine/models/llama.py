"""Llama (and SmolLM2): biases as the config says."""

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    return config.dense(config.attention(qkv_bias=bias, o_bias=bias), config.mlp(bias=config.flag("mlp_bias")))
