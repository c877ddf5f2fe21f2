"""Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v, a mixture of experts and a shared expert in every few layers."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router, SharedExpert
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = config.attention(qkv_bias=bool(config.raw.get("qkv_bias", True)), num_kv_heads=16)
    window = config.window(4096) if config.flag("use_sliding_window") else None
    # Every other layer of the first slides, as in transformers.
    num_windows = config.size("max_window_layers", default=28) if window is not None else 0
    slides = [index % 2 == 0 and index < num_windows for index in range(config.num_layers)]
    windows = config.windows(window, ["sliding_attention" if slide else "full_attention" for slide in slides])
    hidden = config.size("hidden_size")
    router = Router(
        hidden_size=hidden,
        num_experts=config.size("num_experts", default=60),
        top_k=config.size("num_experts_per_tok", default=4),
        normalised=config.flag("norm_topk_prob"),
    )
    shared = SharedExpert(hidden, config.size("shared_expert_intermediate_size", default=5632))
    experts = MixtureOfExperts(config.size("moe_intermediate_size", default=1408), router, shared)
    return config.routed([replace(attention, window=window) for window in windows], experts)
