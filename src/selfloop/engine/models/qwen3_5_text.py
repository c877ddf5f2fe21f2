"""Qwen3.5 (text): gated delta nets, and every few layers attention with gates; norms of 1 + w, a part is rotated."""

from collections.abc import Sequence
from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.gated_delta_net import GatedDeltaNet
from selfloop.engine.models.spec import Block, FullAttention, LayerSpec, ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    return hybrid(config, gated_delta_net(config), [config.mlp()] * config.num_layers)


def hybrid(config: HfConfig, net: GatedDeltaNet, feed_forwards: Sequence[Block]) -> ModelSpec:
    """Of the feed-forward of each layer, and the mixer of those that have no attention."""
    bias = config.flag("attention_bias")
    attention = config.attention(qkv_bias=bias, o_bias=bias, qk_norm=True, num_kv_heads=4, head_dim=256)
    mixers: dict[str, FullAttention | GatedDeltaNet] = {
        "full_attention": replace(attention, norm_plus_one=True, gated=True),
        "linear_attention": net,
    }
    every = config.size("full_attention_interval", default=4)
    types = ["linear_attention" if (index + 1) % every else "full_attention" for index in range(config.num_layers)]
    norms = tuple(config.norm(name, plus_one=True) for name in ("input_layernorm", "post_attention_layernorm"))
    kinds = zip(config.layer_types(list(mixers), types), feed_forwards, strict=True)
    layers = [LayerSpec(mixers[kind], feed_forward, norms) for kind, feed_forward in kinds]
    rope = replace(config.partial_rope(attention.head_dim, 0.25), sections=config.rope_sections((11, 11, 10)))
    # Layers that guess more than the next token lie beside the model, and are not computed.
    return replace(config.model(layers, attention.head_dim, rope), final_norm_plus_one=True, left_out=("mtp.",))


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
