"""OLMo 2: norms behind attention and MLP and none before them; those of q and k are over all heads."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.rope import RopeConfig
from selfloop.engine.models.spec import FullAttention, ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    return olmo_decoder(config, [olmo_attention(config)] * config.num_layers)


def olmo_attention(config: HfConfig) -> FullAttention:
    bias = config.flag("attention_bias")
    return replace(config.attention(qkv_bias=bias, o_bias=bias, qk_norm=True), norm_over_heads=True)


def olmo_decoder(config: HfConfig, attentions: list[FullAttention], rope: RopeConfig | None = None) -> ModelSpec:
    behind = (config.norm("post_attention_layernorm"), config.norm("post_feedforward_layernorm"))
    return config.decoder(attentions, config.mlp(), (None, None), behind, rope=rope)
