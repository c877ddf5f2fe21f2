"""Mixtral: a mixture of experts in every layer, with Mistral's attention."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import ExpertNames, MixtureOfExperts, Router
from selfloop.engine.models.spec import ModelSpec

ROUTER = "block_sparse_moe.gate"
EXPERTS = ExpertNames("block_sparse_moe.experts", gate="w1", up="w3", down="w2")


def spec(config: HfConfig) -> ModelSpec:
    attention = replace(config.attention(num_kv_heads=8), window=config.window())
    router = Router(
        hidden_size=config.size("hidden_size"),
        num_experts=config.size("num_local_experts", "num_experts", default=8),
        top_k=config.size("num_experts_per_tok", default=2),
        normalised=True,
        name=ROUTER,
    )
    experts = MixtureOfExperts(config.size("intermediate_size"), router, names=EXPERTS)
    return config.routed([attention] * config.num_layers, experts)
