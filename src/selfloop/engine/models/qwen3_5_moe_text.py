"""Qwen3.5 with a mixture of experts (text): as Qwen3.5, with experts and a shared one in every layer."""

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router, SharedExpert
from selfloop.engine.models.qwen3_5_text import gated_delta_net, hybrid
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    hidden = config.size("hidden_size")
    router = Router(
        hidden_size=hidden,
        num_experts=config.size("num_experts", default=256),
        top_k=config.size("num_experts_per_tok", default=8),
        normalised=True,
    )
    shared = SharedExpert(hidden, config.size("shared_expert_intermediate_size", default=512))
    experts = MixtureOfExperts(config.size("moe_intermediate_size", default=512), router, shared)
    return hybrid(config, gated_delta_net(config), [experts] * config.num_layers)
