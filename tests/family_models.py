"""Tiny random models of the families that people train, of transformers' own configurations, by ``model_type``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCAB_SIZE = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# A window that sequences of the checks outgrow.
_WINDOW = 8
_WINDOWED = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {
    "routed_scaling_factor": 1.5,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
_GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {"shared_expert_intermediate_size": 16}

OVERRIDES: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": _WINDOW},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _QWEN_EXPERTS,
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": {**_GATED_DELTA, **_QWEN_EXPERTS, **_SHARED},
    "qwen3_next": {**_GATED_DELTA, **_QWEN_EXPERTS, **_SHARED},
    "gemma2": {**_WINDOWED, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 5.0, "tie_word_embeddings": True},
    "gemma3_text": {**_WINDOWED, "tie_word_embeddings": True},
    "gemma4_text": {
        **_WINDOWED,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4": {},
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_MLA, **_ROUTED, "mlp_layer_types": ["dense", "sparse"]},
    "glm_moe_dsa": {
        **_MLA,
        **_ROUTED,
        "mlp_layer_types": ["dense", "sparse"],
        "index_topk": 8,
        "index_head_dim": 16,
        # Scores are cut at zero: with few heads many are equal, and which of those is chosen is a matter of layout.
        "index_n_heads": 16,
    },
    "deepseek_v3": {**_MLA, **_ROUTED, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "o_groups": 2,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "sliding_window": _WINDOW,
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
        "num_nextn_predict_layers": 0,
    },
    "kimi_linear": {
        **_MLA,
        "q_lora_rank": None,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": _WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": _WINDOWED,
    "granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 4.0,
    },
    "granitemoehybrid": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "llama4_text": {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": _WINDOW,
        "floor_scale": 8,
    },
    "cohere2": {**_WINDOWED, "logit_scale": 0.25, "tie_word_embeddings": True},
    "seed_oss": {},
}


_SIGHT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
_QWEN_SIGHT = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
# Models that see, too, by ``model_type``: of their text halves, and what their eyes are.
WHOLES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**_SIGHT, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}),
    "mistral3": ("ministral3", {**_SIGHT, "num_hidden_layers": 1, "head_dim": 8, "model_type": "pixtral"}),
    "qwen3_5": ("qwen3_5_text", _QWEN_SIGHT),
    "qwen3_5_moe": ("qwen3_5_moe_text", _QWEN_SIGHT),
}


def build_whole(model_type: str) -> PreTrainedModel:
    """One of :data:`WHOLES`, in float32."""
    torch.manual_seed(0)
    text, sight = WHOLES[model_type]
    sizes = {**_SIZES, **OVERRIDES[text], "model_type": text}
    tied = bool(sizes["tie_word_embeddings"])
    config = AutoConfig.for_model(model_type, text_config=sizes, vision_config=sight, tie_word_embeddings=tied)
    return _disturbed(AutoModelForImageTextToText.from_config(config))


def stack_experts(folder: Path) -> None:
    """Write the folder's experts as published ones are: stacks of a layer each, beside a layer that guesses ahead."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    parts: dict[str, list[list[Tensor]]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")]):
        before, found, after = name.partition(".experts.")
        if found:
            number, projection, _ = after.split(".")
            stack = parts.setdefault(f"{before}.experts.{_STACKED[projection]}", [])
            if projection != "up_proj":
                stack.append([])
            stack[int(number)].append(tensors.pop(name))
    stacks = {name: torch.stack([torch.cat(own) for own in each]) for name, each in parts.items()}
    save_file({**tensors, **stacks, "mtp.norm.weight": torch.ones(3)}, path, {"format": "pt"})


_STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


def build(model_type: str) -> PreTrainedModel:
    """A float32 model whose weights are large enough that attention, norms and routers matter."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in (_SIZES | OVERRIDES[model_type]).items() if value is not None}
    return _disturbed(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)))


def _disturbed(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for parameter in (*model.parameters(), *corrections):
            spread = 0.15 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()
