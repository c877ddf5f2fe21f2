"""Qwen3.5 (text): gated delta nets, and every few layers attention with gates; norms of 1 + w, a part is rotated."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.gated_delta_net import GatedDeltaNet
from selfloop.engine.models.spec import FullAttention, LayerSpec, ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, o_bias=bias, qk_norm=True, num_kv_heads=4, head_dim=256)
    mixers: dict[str, FullAttention | GatedDeltaNet] = {
        "full_attention": replace(attention, norm_plus_one=True, gated=True),
        "linear_attention": gated_delta_net(config),
    }
    every = config.size("full_attention_interval", default=4)
    types = ["linear_attention" if (index + 1) % every else "full_attention" for index in range(config.num_layers)]
    mlp = config.mlp()
    norms = tuple(config.norm(name, plus_one=True) for name in ("input_layernorm", "post_attention_layernorm"))
    layers = [LayerSpec(mixers[kind], mlp, norms) for kind in config.layer_types(list(mixers), types)]
    rope = config.partial_rope(attention.head_dim, 0.25)
    return replace(config.model(layers, attention.head_dim, rope), final_norm_plus_one=True)


def gated_delta_net(config: HfConfig) -> GatedDeltaNet:
    return GatedDeltaNet(
        hidden_size=config.size("hidden_size"),
        num_key_heads=config.size("linear_num_key_heads", default=16),
        num_value_heads=config.size("linear_num_value_heads", default=32),
        key_dim=config.size("linear_key_head_dim", default=128),
        value_dim=config.size("linear_value_head_dim", default=128),
        kernel=config.size("linear_conv_kernel_dim", default=4),
        eps=config.eps,
    )
