"""Granite: Llama with factors of embeddings, scores, residuals and logits."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.errors import model_invalid


def spec(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, o_bias=bias)
    attention = replace(attention, scale=config.number("attention_multiplier", 1.0))
    spec = config.dense(attention, config.mlp(bias=config.flag("mlp_bias")))
    divisor = config.number("logits_scaling", 1.0)
    if divisor == 0:
        raise model_invalid("config.json: logits_scaling must be above 0, is 0")
    residual = config.number("residual_multiplier", 1.0)
    return replace(
        spec,
        layers=tuple(replace(layer, residual_scale=residual) for layer in spec.layers),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1 / divisor,
    )
