"""Qwen3 with a mixture of experts in every layer, or in every few of them."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    bias = config.flag("attention_bias")
    # One window for all layers, as in transformers.
    window = config.window(4096) if config.flag("use_sliding_window") else None
    attention = replace(config.attention(qkv_bias=bias, o_bias=bias, qk_norm=True, num_kv_heads=4), window=window)
    router = Router(
        hidden_size=config.size("hidden_size"),
        num_experts=config.size("num_local_experts", "num_experts", default=128),
        top_k=config.size("num_experts_per_tok", default=8),
        normalised=config.flag("norm_topk_prob"),
    )
    experts = MixtureOfExperts(config.size("moe_intermediate_size", default=768), router)
    return config.routed([attention] * config.num_layers, experts)
