"""Families whose files name tensors otherwise than transformers names its modules, after which PEFT names adapters."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Patterns and what they become, in this order. The embedding has the name that it has in every other family.
_MODULES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "deepseek_v4": (
        (r"^(embed|model\.embed)\.", "model.embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^layers\.", "model.layers."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.indexer\.", ".compressor.indexer."),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_a\.", ".o_a_proj."),
        (r"\.wo_b\.", ".o_b_proj."),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    ),
    "kimi_linear": (
        (r"\.self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)\b", r".self_attn.forget_gate.\1"),
        (r"\.block_sparse_moe\.", ".mlp."),
    ),
    "nemotron_h": ((r"^(backbone|model)\.embeddings\.", "model.embed_tokens."), (r"^backbone\.", "model.")),
}


def are_renamed(model_type: str) -> bool:
    """Whether a family's files name tensors by other names than its modules have."""
    return model_type in _MODULES


def module_names(stored: Mapping[str, T], model_type: str) -> dict[str, T]:
    """The same tensors by the names of their modules; in most families those that they are stored under."""
    return {_module_name(name, model_type): of for name, of in stored.items()}


def _module_name(name: str, model_type: str) -> str:
    for pattern, becomes in _MODULES.get(model_type, ()):
        name = re.sub(pattern, becomes, name)
    return name
