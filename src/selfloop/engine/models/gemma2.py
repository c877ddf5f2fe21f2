"""Gemma 2: four norms of 1 + w a layer, windows in every other one, soft caps of scores and of logits."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import FullAttention, ModelSpec
from selfloop.types.errors import model_invalid


def spec(config: HfConfig) -> ModelSpec:
    attention = replace(gemma_attention(config), softcap=config.cap("attn_logit_softcapping", 50.0))
    types = [("sliding_attention", "full_attention")[index % 2] for index in range(config.num_layers)]
    windows = config.windows(config.window(4096), types)
    spec = gemma_decoder(config, [replace(attention, window=window) for window in windows])
    return replace(spec, logit_softcap=config.cap("final_logit_softcapping", 30.0))


def gemma_attention(config: HfConfig) -> FullAttention:
    """Its scores are scaled by a size of its own."""
    if config.flag("use_bidirectional_attention"):
        raise model_invalid("use_bidirectional_attention is not supported: tokens would see those after them")
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, o_bias=bias, num_kv_heads=4, head_dim=256)
    return replace(attention, scale=config.size("query_pre_attn_scalar", default=256) ** -0.5)


def gemma_decoder(config: HfConfig, attentions: list[FullAttention]) -> ModelSpec:
    names = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
    norms = [config.norm(name, plus_one=True) for name in names]
    mlp = replace(config.mlp(), activation=config.activation("hidden_activation", "gelu_pytorch_tanh"))
    spec = config.decoder(attentions, mlp, (norms[0], norms[1]), (norms[2], norms[3]))
    return replace(spec, embedding_scale=spec.hidden_size**0.5, final_norm_plus_one=True)
