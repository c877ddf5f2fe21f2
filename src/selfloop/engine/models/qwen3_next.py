"""Qwen3-Next: as Qwen3.5, experts in every layer or in some, and the delta net's projections in two matrices."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router, SharedExpert
from selfloop.engine.models.qwen3_5_text import gated_delta_net, hybrid
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    hidden = config.size("hidden_size")
    router = Router(
        hidden_size=hidden,
        num_experts=config.size("num_local_experts", "num_experts", default=512),
        top_k=config.size("num_experts_per_tok", default=10),
        normalised=bool(config.raw.get("norm_topk_prob", True)),
    )
    shared = SharedExpert(hidden, config.size("shared_expert_intermediate_size", default=512))
    experts = MixtureOfExperts(config.size("moe_intermediate_size", default=512), router, shared)
    return hybrid(config, replace(gated_delta_net(config), packed=True), config.feed_forwards(experts))
