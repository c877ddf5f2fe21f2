"""GLM-4: norms before and behind, half of each head rotated in pairs of neighbours, gate and up in one matrix."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec


def spec(config: HfConfig) -> ModelSpec:
    qkv_bias = bool(config.raw.get("attention_bias", True))
    attention = replace(config.attention(qkv_bias=qkv_bias, num_kv_heads=2, head_dim=128), interleaved=True)
    rope = config.partial_rope(attention.head_dim, 0.5)
    behind = (config.norm("post_self_attn_layernorm"), config.norm("post_mlp_layernorm"))
    mlp = replace(config.mlp(), fused=True)
    return config.decoder([attention] * config.num_layers, mlp, post_norms=behind, rope=rope)
