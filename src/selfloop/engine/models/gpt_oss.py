"""gpt-oss: attention with sinks and biases, a window in every other layer, experts of a clamped gate in stacks."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import Clamp, MixtureOfExperts, Router
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    bias = bool(config.raw.get("attention_bias", True))
    attention = replace(config.attention(qkv_bias=bias, o_bias=bias, num_kv_heads=8, head_dim=64), sinks=True)
    types = ["full_attention" if index % 2 else "sliding_attention" for index in range(config.num_layers)]
    router = Router(
        hidden_size=config.size("hidden_size"),
        num_experts=config.size("num_local_experts", "num_experts", default=128),
        top_k=config.size("num_experts_per_tok", default=4),
        scoring="softmax_of_chosen",
        bias=True,
        name="mlp.router",
    )
    clamp = Clamp(config.number("swiglu_alpha", 1.702), config.number("swiglu_limit", 7.0))
    experts = MixtureOfExperts(config.size("intermediate_size"), router, clamp=clamp, stacks=True)
    windows = config.windows(config.window(128), types)
    return config.routed([replace(attention, window=window) for window in windows], experts)
