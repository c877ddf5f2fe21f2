"""Tiny random models of every family, saved as Hugging Face folders, and helpers around them."""

import warnings
from pathlib import Path

import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from selfloop.types.datum import Datum, Tensor

VOCAB_SIZE = 96
EOS = 2

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# Whose heads have the sixteen dimensions that the CPU kernels need.
_WIDE = {**_SIZES, "hidden_size": 64, "intermediate_size": 112}

_BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)),
    "llama3-rope": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=_LLAMA3)),
    "llama-yarn": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=_YARN)),
    "llama-linear": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=_LINEAR)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=None)),
    # Windows shorter than a page of the cache, and a layer that sees everything.
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=11)),
    "qwen3-windows": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_SIZES, head_dim=16, use_sliding_window=True, sliding_window=21, max_window_layers=1)
    ),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**_SIZES, pad_token_id=0, no_rope_layers=[1, 0])),
}

_GEMMA = {**_SIZES, "head_dim": 8, "pad_token_id": 0, "query_pre_attn_scalar": 24}
_BUILDERS |= {
    # Soft caps of attention and of logits, both low enough to bend what is below them.
    "gemma2-own": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GEMMA, sliding_window=11, attn_logit_softcapping=3.0, final_logit_softcapping=4.0)
    ),
    "gemma3-own": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_GEMMA, sliding_window=11, layer_types=["sliding_attention", "full_attention"])
    ),
}

_OLMO3_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_BUILDERS |= {
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**_SIZES, head_dim=16, pad_token_id=0)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SIZES)),
    "olmo3": lambda: Olmo3ForCausalLM(
        Olmo3Config(
            **_SIZES,
            sliding_window=11,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": _OLMO3_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES, pad_token_id=0, sliding_window=21)),
    "phi3-longrope": lambda: Phi3ForCausalLM(
        Phi3Config(
            **{**_SIZES, "hidden_size": 64},
            pad_token_id=0,
            original_max_position_embeddings=160,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 4.0, 8.0, 16.0],
                "original_max_position_embeddings": 160,
            },
        )
    ),
    "granite-own": lambda: GraniteForCausalLM(
        GraniteConfig(
            **_SIZES, logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=4.0
        )
    ),
}

_QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# A rotation of half of each head, of a quarter of eight dimensions there would be but one pair.
_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_BUILDERS["qwen3_5-own"] = lambda: Qwen3_5ForCausalLM(
    Qwen3_5TextConfig(**_SIZES, head_dim=16, rope_parameters=_HALF, **_QWEN3_5)
)

RECURRENT_FAMILIES = ("qwen3_5-own",)

FAMILIES = tuple(_BUILDERS)

_EXPERTS = {**_SIZES, "num_hidden_layers": 3, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2}

_BUILDERS |= {
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_EXPERTS, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1])
    ),
    "qwen3-moe-sparse": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_EXPERTS, moe_intermediate_size=16, norm_topk_prob=False, decoder_sparse_step=2)
    ),
}

_SHARED = {**_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}
_BUILDERS["qwen2-moe"] = lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SHARED))
_BUILDERS["qwen3-moe-experts"] = lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_EXPERTS, moe_intermediate_size=16))

_SMALL = {**_SIZES, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 6}
_TOP2 = {"num_experts_per_tok": 2}
_BUILDERS |= {
    "qwen3_5-moe": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_SMALL, **_TOP2, head_dim=16, **_QWEN3_5)),
    "qwen3-next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(**_SMALL, **_TOP2, head_dim=16, mlp_only_layers=[0], **_QWEN3_5)
    ),
    "glm4-moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **_SIZES, **_TOP2, moe_intermediate_size=16, n_routed_experts=6, n_group=2, head_dim=8, use_qk_norm=True
        )
    ),
    "minimax-m2": lambda: MiniMaxM2ForCausalLM(MiniMaxM2Config(**_SIZES, **_TOP2, num_local_experts=6, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, **_TOP2, num_local_experts=6)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_SIZES, **_TOP2, num_experts=6, pad_token_id=0)),
}
ROUTED_FAMILIES = ("qwen3_5-moe", "qwen3-next", "glm4-moe", "minimax-m2", "mixtral", "olmoe")
"""Of further mixtures, each with routers or names of its own."""

_NAMES = ("gate_proj", "up_proj", "down_proj")
MOE_FAMILIES = dict.fromkeys(("qwen3-moe", "qwen3-moe-sparse", "qwen2-moe"), (6, _NAMES))
"""How many experts each has, and what the projections of one are called."""

_OTHER_GEMMA = {**_SIZES, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0}
# By which transformers' own code is tested, whether or not a family of ours describes them.
_OTHERS = {
    # Windows in every other layer, norms of 1 + w, a scaled and tied embedding.
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_OTHER_GEMMA, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True)
    ),
    # Soft caps of attention and of logits.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_OTHER_GEMMA, final_logit_softcapping=4.0)),
    # Logits are divided, and so is much else.
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            **_SIZES, logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.5, embedding_multiplier=4.0
        )
    ),
    # A recurrence, which sequences in one row leak through.
    "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_SIZES, head_dim=8, **_QWEN3_5)),
}
OTHER_FAMILIES = tuple(_OTHERS)
_BUILDERS |= _OTHERS
_BUILDERS["cohere2"] = lambda: Cohere2ForCausalLM(Cohere2Config(**_SIZES, pad_token_id=0, sliding_window=8))

_BUILDERS |= {
    "llama-wide": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE)),
    "llama-wide-tied": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE, tie_word_embeddings=True)),
    "llama-wide-biased": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE, attention_bias=True, mlp_bias=True)),
    "qwen2-wide": lambda: Qwen2ForCausalLM(Qwen2Config(**_WIDE)),
}


def build(family: str) -> PreTrainedModel:
    """A float32 model whose weights are large enough that attention and norms matter."""
    torch.manual_seed(0)
    model = _BUILDERS[family]().eval()
    with torch.no_grad():
        corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for parameter in (*model.parameters(), *corrections):
            # Norms and biases too: at their initial ones and zeros a mistake in them would not show.
            spread = 0.15 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def save(family: str, directory: Path) -> Path:
    """Build and save; returns the folder."""
    save_quietly(build(family), directory)
    return directory


def save_quietly(model: PreTrainedModel, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


def random_ids(num: int, seed: int) -> list[int]:
    """Ids that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num,), generator=generator).tolist()


def next_token_datum(ids: list[int], weights: list[float] | None = None) -> Datum:
    """Predict ids[1:] from ids[:-1]."""
    inputs = {"target_tokens": Tensor.of(ids[1:], "int64")}
    if weights is not None:
        inputs["weights"] = Tensor.of(weights, "float32")
    return Datum(Tensor.of(ids[:-1], "int64"), inputs)
