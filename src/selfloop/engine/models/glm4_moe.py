"""GLM-4.5 to 4.7: sigmoid routers with a correction, a shared expert, the first layers dense, partial rotation."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.mixture_of_experts import MixtureOfExperts, Router, SharedExpert
from selfloop.engine.models.spec import Block, LayerSpec, ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    attention = config.attention(
        qkv_bias=config.flag("attention_bias"), qk_norm=config.flag("use_qk_norm"), num_kv_heads=8
    )
    hidden, inner = config.size("hidden_size"), config.size("moe_intermediate_size", default=1408)
    router = Router(
        hidden_size=hidden,
        num_experts=config.size("n_routed_experts", "num_local_experts", default=128),
        top_k=config.size("num_experts_per_tok", default=8),
        scoring="sigmoid",
        normalised=bool(config.raw.get("norm_topk_prob", True)),
        scale=config.number("routed_scaling_factor", 1.0),
        correction="mlp.gate.e_score_correction_bias",
        groups=(config.size("n_group", default=1), config.size("topk_group", default=1)),
        in_float32=True,
    )
    num_shared = config.size("n_shared_experts", default=1)
    shared = SharedExpert(hidden, inner * num_shared, "mlp.shared_experts", gate=None)
    experts = MixtureOfExperts(inner, router, shared)
    num_dense = int(config.number("first_k_dense_replace", 1))
    feed_forwards: list[Block] = [config.mlp() if i < num_dense else experts for i in range(config.num_layers)]
    layers = [LayerSpec(attention, feed_forward, config.norms()) for feed_forward in feed_forwards]
    rope = config.partial_rope(attention.head_dim, 0.5)
    return replace(config.model(layers, attention.head_dim, rope), left_out=config.layers_behind())
