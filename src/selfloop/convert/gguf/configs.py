"""GGUF's metadata as a ``config.json``: of each architecture what llama.cpp computes of it.

What a file does not say, because llama.cpp has it in its code, is here with the reason.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize

from selfloop.convert.gguf.metadata import Metadata, refusal, rounded
from selfloop.convert.gguf.names import ROPE_FREQS
from selfloop.engine.models.rope import RopeConfig, inverse_frequencies

Config = dict[str, Any]

_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
# The contexts that Llama 3's scaling may have begun from.
_ORIGINAL_CONTEXTS = [2**exponent for exponent in range(5, 18)]
# In these Gemmas, of so many layers, scores are scaled by hidden / heads; in the others by a head's size.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def read_config(metadata: Metadata) -> Config:
    """The ``config.json`` of the model.

    Raises:
        BadRequest: the architecture is not known, or the file says something of it that is not.
    """
    make = _CONFIGS.get(metadata.architecture)
    if make is None:
        raise refusal(
            f"{metadata.path} holds a model of architecture {metadata.architecture!r}, which is not read from GGUF; "
            f"known: {', '.join(sorted(_CONFIGS))}"
        )
    config = make(metadata)
    metadata.check_all_read()
    return config


def _common(of: Metadata) -> Config:
    embedding = of.tensors.get("token_embd.weight")
    if embedding is None:
        raise refusal(f"{of.path} has no token_embd.weight")
    heads, hidden = of.need("attention.head_count", int), of.need("embedding_length", int)
    kv_heads, key_length = of.get("attention.head_count_kv", int), of.get("attention.key_length", int)
    return {
        "hidden_size": hidden,
        "intermediate_size": of.get("feed_forward_length", int) or 0,
        "num_hidden_layers": of.need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": hidden // heads if key_length is None else key_length,
        "max_position_embeddings": of.need("context_length", int),
        "rms_norm_eps": of.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": rounded(of.get("rope.freq_base", float) or 10000.0),
        "tie_word_embeddings": "output.weight" not in of.tensors,
        "vocab_size": int(embedding.shape[1]),
    } | _scaling(of)


def _scaling(of: Metadata) -> Config:
    """``rope_scaling`` of what the file calls linear or yarn."""
    kind, factor = of.get("rope.scaling.type", str), of.get("rope.scaling.factor", float)
    original = of.get("rope.scaling.original_context_length", int)
    if kind in (None, "none", "longrope"):
        return {}
    if kind not in ("linear", "yarn") or factor is None:
        raise refusal(f"{of.path}: rope.scaling.type {kind!r} with factor {factor} is not known; linear and yarn are")
    scaling: Config = {"rope_type": kind, "factor": rounded(factor)}
    return {"rope_scaling": scaling | ({} if original is None else {"original_max_position_embeddings": original})}


def _rotates_whole_heads(of: Metadata, config: Config) -> Config:
    rotated = of.get("rope.dimension_count", int)
    if rotated not in (None, config["head_dim"]):
        raise refusal(f"{of.path}: {of.architecture} with {rotated} of {config['head_dim']} dimensions rotated")
    return config


def _rotates_part(of: Metadata, config: Config) -> Config:
    rotated = of.get("rope.dimension_count", int)
    part = 1.0 if rotated is None else rotated / config["head_dim"]
    return config | {"partial_rotary_factor": part}


def _has(of: Metadata, name: str) -> bool:
    return f"blk.0.{name}" in of.tensors


def _llama(of: Metadata) -> Config:
    """Llama, and Mistral, which llama.cpp takes for one."""
    if of.get("expert_count", int):
        raise refusal(f"{of.path} holds a Mixtral (llama with experts), which is not read from GGUF")
    of.get("expert_used_count", int)
    config = _rotates_whole_heads(of, _common(of))
    window = of.get("attention.sliding_window", int)
    if window:
        return config | {"model_type": "mistral", "sliding_window": window}
    biases = {"attention_bias": _has(of, "attn_q.bias"), "mlp_bias": _has(of, "ffn_gate.bias")}
    return config | {"model_type": "llama", **biases} | _factored(of, config)


def _factored(of: Metadata, config: Config) -> Config:
    """``rope_scaling`` of the numbers by which llama.cpp divides each frequency, where the file has them.

    Those of Llama 3 follow from four of its own, of which the file has none; they are tried. Others are written out,
    which LongRoPE does.
    """
    stored = of.tensors.get(ROPE_FREQS)
    if stored is None:
        return {}
    factors = torch.tensor(dequantize(stored.data, stored.tensor_type))
    theta, head_dim, context = config["rope_theta"], config["head_dim"], config["max_position_embeddings"]
    if len(factors) != head_dim // 2:
        raise refusal(f"{of.path}: {ROPE_FREQS} has {len(factors)} numbers, expected {head_dim // 2}")
    plain, _ = inverse_frequencies(RopeConfig("default", theta, head_dim))
    factor = rounded(float(factors.max()))
    for original in _ORIGINAL_CONTEXTS:
        tried = RopeConfig("llama3", theta, head_dim, factor, original)
        if torch.allclose(plain / inverse_frequencies(tried)[0], factors, rtol=1e-5, atol=0):
            llama3: Config = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {"rope_scaling": llama3 | {"original_max_position_embeddings": original}}
    each = [float(number) for number in factors]
    longrope = {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}
    return {"rope_scaling": longrope | {"original_max_position_embeddings": context}}


def _qwen2(of: Metadata) -> Config:
    return _rotates_whole_heads(of, _common(of)) | {"model_type": "qwen2", "use_sliding_window": False}


def _qwen3(of: Metadata) -> Config:
    bias = {"attention_bias": _has(of, "attn_q.bias")}
    return _qwen2(of) | {"model_type": "qwen3"} | bias


def _experts(of: Metadata, config: Config) -> Config:
    sizes = {
        "num_experts": of.need("expert_count", int),
        "num_experts_per_tok": of.need("expert_used_count", int),
        "moe_intermediate_size": of.need("expert_feed_forward_length", int),
    }
    # The size of dense layers, which such files need not say, as there are none.
    inner = config["intermediate_size"] or sizes["moe_intermediate_size"]
    return config | sizes | {"intermediate_size": inner}


def _qwen3_moe(of: Metadata) -> Config:
    # llama.cpp divides by the sum in this architecture.
    return _experts(of, _qwen3(of)) | {"model_type": "qwen3_moe", "norm_topk_prob": True}


def _qwen2_moe(of: Metadata) -> Config:
    shared = of.need("expert_shared_feed_forward_length", int)
    config = _experts(of, _qwen2(of))
    return config | {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": shared,
        "qkv_bias": _has(of, "attn_q.bias"),
    }


def _gemma(of: Metadata) -> Config:
    config = _rotates_whole_heads(of, _common(of))
    large = config["num_hidden_layers"] == _LAYERS_OF_27B[of.architecture]
    scale_of = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    window = of.need("attention.sliding_window", int)
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale_of,
        "sliding_window": window,
    }


def _gemma2(of: Metadata) -> Config:
    caps = {key: rounded(of.need(key, float)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    num = of.need("block_count", int)
    types = [("sliding_attention", "full_attention")[index % 2] for index in range(num)]
    return _gemma(of) | caps | {"model_type": "gemma2", "layer_types": types}


def _gemma3(of: Metadata) -> Config:
    config, num = _gemma(of), of.need("block_count", int)
    local = rounded(of.get("rope.freq_base_swa", float) or 10000.0)
    cap = of.get("final_logit_softcapping", float)
    scaling = config.pop("rope_scaling", {"rope_type": "default"})
    # llama.cpp's is six; the last of so many layers sees everything, and it alone is scaled.
    every = of.get("attention.sliding_window_pattern", int) or 6
    types = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(num)]
    return config | {
        "model_type": "gemma3_text",
        "layer_types": types,
        "final_logit_softcapping": cap,
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": {"rope_theta": config["rope_theta"], **scaling},
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
    }


def _phi3(of: Metadata) -> Config:
    config = _rotates_part(of, _common(of))
    window = of.get("attention.sliding_window", int)
    attention_factor = of.get("rope.scaling.attn_factor", float)
    factors = {key: of.tensors[name] for key, name in _FACTORS.items() if name in of.tensors}
    config |= {"model_type": "phi3", "sliding_window": window or None}
    if not factors:
        return config
    original = of.get("rope.scaling.original_context_length", int) or config["max_position_embeddings"]
    numbers = {key: [float(x) for x in np.ravel(of_kind.data)] for key, of_kind in factors.items()}
    factor = {} if attention_factor is None else {"attention_factor": rounded(attention_factor)}
    return config | {
        "original_max_position_embeddings": original,
        "rope_scaling": {"rope_type": "longrope", **numbers, **factor},
    }


def _olmo2(of: Metadata) -> Config:
    if of.get("attention.sliding_window", int):
        raise refusal(f"{of.path} holds an OLMo 3 (olmo2 with sliding windows), which is not read from GGUF")
    return _rotates_whole_heads(of, _common(of)) | {"model_type": "olmo2", "attention_bias": _has(of, "attn_q.bias")}


def _granite(of: Metadata) -> Config:
    config = _rotates_whole_heads(of, _common(of))
    numbers = {
        "attention_multiplier": of.number("attention.scale"),
        "embedding_multiplier": of.number("embedding_scale"),
        "residual_multiplier": of.number("residual_scale"),
        "logits_scaling": of.number("logit_scale"),
    }
    biases = {"attention_bias": _has(of, "attn_q.bias"), "mlp_bias": _has(of, "ffn_gate.bias")}
    return config | numbers | biases | {"model_type": "granite"} | _factored(of, config)


def _glm4(of: Metadata) -> Config:
    return _rotates_part(of, _common(of)) | {"model_type": "glm4", "attention_bias": _has(of, "attn_q.bias")}


def _smollm3(of: Metadata) -> Config:
    # llama.cpp leaves every fourth layer unrotated.
    num = of.need("block_count", int)
    rotates = [int((index + 1) % 4 != 0) for index in range(num)]
    config = _rotates_whole_heads(of, _common(of))
    biases = {"attention_bias": _has(of, "attn_q.bias"), "mlp_bias": _has(of, "ffn_gate.bias")}
    return config | biases | {"model_type": "smollm3", "no_rope_layers": rotates, "use_sliding_window": False}


_CONFIGS: dict[str, Callable[[Metadata], Config]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "glm4": _glm4,
    "granite": _granite,
    "llama": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "smollm3": _smollm3,
}
