"""MiniMax-M2: sigmoid routers with a correction, norms over all heads of q and of k, partial rotation."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixtral import EXPERTS, ROUTER
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = replace(config.attention(qk_norm=True, num_kv_heads=8, head_dim=128), norm_over_heads=True)
    router = Router(
        hidden_size=config.size("hidden_size"),
        num_experts=config.size("num_local_experts", "num_experts", default=256),
        top_k=config.size("num_experts_per_tok", default=8),
        scoring="sigmoid",
        normalised=True,
        correction="block_sparse_moe.e_score_correction_bias",
        name=ROUTER,
    )
    experts = MixtureOfExperts(config.size("intermediate_size"), router, names=EXPERTS)
    # Published folders say how many dimensions are rotated, not which part.
    rotated = config.size("rotary_dim", default=attention.head_dim)
    rope = config.partial_rope(attention.head_dim, rotated / attention.head_dim)
    return config.routed([attention] * config.num_layers, experts, rope)
