"""Phi-3 and Phi-4: Llama with q, k and v in one matrix, gate and up in another; some rotate a part of each head."""

from dataclasses import replace

from selfloop.engine.models.config import HfConfig
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.errors import model_invalid
from selfloop.types.transformers_models import OLD_NAMES_OF_LONGROPE


def spec(config: HfConfig) -> ModelSpec:
    attention = replace(config.attention(), fused=True, window=config.window())
    rope = config.partial_rope(attention.head_dim, 1.0, dict.fromkeys(OLD_NAMES_OF_LONGROPE, "longrope"))
    if rope.kind not in ("default", "longrope"):
        raise model_invalid(f"rope scaling {rope.kind!r} is not supported of Phi-3; known: ['default', 'longrope']")
    return config.decoder([attention] * config.num_layers, replace(config.mlp(), fused=True), rope=rope)
