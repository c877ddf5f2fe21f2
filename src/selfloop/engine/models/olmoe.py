"""OLMoE: a mixture of experts in every layer, norms over all heads of q and of k."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.errors import model_invalid


def spec(config: HfConfig) -> ModelSpec:
    if config.raw.get("clip_qkv") is not None:
        raise model_invalid(f"clip_qkv {config.raw['clip_qkv']!r} is not supported")
    bias = config.flag("attention_bias")
    attention = replace(config.attention(qkv_bias=bias, o_bias=bias, qk_norm=True), norm_over_heads=True)
    router = Router(
        hidden_size=config.size("hidden_size"),
        num_experts=config.size("num_local_experts", "num_experts", default=64),
        top_k=config.size("num_experts_per_tok", default=8),
        normalised=config.flag("norm_topk_prob"),
    )
    experts = MixtureOfExperts(config.size("intermediate_size"), router)
    return config.routed([attention] * config.num_layers, experts)
