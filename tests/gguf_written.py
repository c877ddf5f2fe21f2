"""Tiny models as the GGUF files that llama.cpp's converter makes of them: names and metadata of each family by hand."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

import gguf_models

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    # Of GLM-4.
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    # Of Gemma and OLMo, which have them in other places.
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_BEHIND = {"gemma2", "gemma3", "olmo2"}
PERMUTED = {"llama", "granite", "smollm3"}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}


def write(
    model_dir: Path,
    path: Path,
    kind: Kind = Kind.F32,
    *,
    more: dict[str, object] | None = None,
    arch: str | None = None,
    stored: dict[str, tuple[np.ndarray, Kind]] | None = None,
    pre: str = "gpt-2",
    add_bos: bool | None = False,
    only: set[str] | None = None,
) -> Path:
    """Write ``model_dir`` as GGUF.

    Args:
        kind: of matrices, as far as their rows are long enough.
        more: keys of the architecture.
        arch: what the file says that it is.
        stored: tensors in place of the model's, or beside them, as they are to be stored.
        pre: how the tokenizer splits.
        add_bos: whether every text begins with its token; None leaves it unsaid.
        only: the tensors that are in the file; None for all.
    """
    raw = json.loads((model_dir / "config.json").read_text())
    own, stored = ARCHITECTURES.get(raw["model_type"], raw["model_type"]), stored or {}
    arch = arch or own
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (_metadata(own, raw) | (more or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add[type(value)](f"{arch}.{key}", value)
    _add_tokenizer(writer, model_dir, raw["vocab_size"], pre)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for name, (values, stored_kind) in stored.items():
        writer.add_tensor(name, values, raw_dtype=stored_kind)
    for name, tensor in _tensors(own, raw, model_dir).items():
        if name in stored or (only is not None and name not in only):
            continue
        values = tensor.float().numpy()
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if values.ndim == 1 or values.shape[-1] % block or kind == Kind.F32:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(arch: str, raw: dict) -> dict[str, object]:
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    head_dim = raw.get("head_dim") or hidden // heads
    rope = raw.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    found: dict[str, object] = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": hidden,
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        "rope.freq_base": float(full["rope_theta"]),
        "vocab_size": raw["vocab_size"],
    }
    if arch not in ("phi3", "qwen2", "olmo2"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("phi3", "glm4"):
        found["rope.dimension_count"] = int(head_dim * full.get("partial_rotary_factor", 1.0))
    if arch.endswith("moe"):
        found |= {
            "expert_count": raw.get("num_experts") or raw["num_local_experts"],
            "expert_used_count": raw["num_experts_per_tok"],
            "expert_feed_forward_length": raw["moe_intermediate_size"],
        }
    if arch == "qwen2moe":
        found["expert_shared_feed_forward_length"] = raw["shared_expert_intermediate_size"]
    if arch in ("gemma2", "gemma3", "phi3") and raw["sliding_window"]:
        found["attention.sliding_window"] = raw["sliding_window"]
    if arch == "gemma2":
        found |= {key: float(raw[key]) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if arch == "granite":
        found |= {
            "attention.scale": float(raw["attention_multiplier"]),
            "embedding_scale": float(raw["embedding_multiplier"]),
            "residual_scale": float(raw["residual_multiplier"]),
            "logit_scale": float(raw["logits_scaling"]),
        }
    if "long_factor" in full:
        found["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    return found


def _tensors(arch: str, raw: dict, model_dir: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        module, _, end = name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        short = module.rpartition(".")[2]
        if arch in PERMUTED and short in ("q_proj", "k_proj"):
            heads = raw["num_attention_heads" if short == "q_proj" else "num_key_value_heads"]
            tensor = torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in tensor.chunk(heads)])
        if arch.startswith("gemma") and module.endswith("norm"):
            tensor = tensor + 1
        if module == "post_attention_layernorm" and arch in _BEHIND:
            own = "post_attention_norm"
        elif ".experts." in module:
            index, part = module.split(".experts.")[1].split(".")
            own = NAMES[f"mlp.experts.{part}"]
            experts.setdefault(f"{prefix}{own}.{end}", {})[int(index)] = tensor
            continue
        else:
            own = NAMES[module]
        found[f"{prefix}{own}.{end}"] = tensor.squeeze(0) if own == "ffn_gate_inp_shexp" else tensor
    found |= {name: torch.stack([of[index] for index in sorted(of)]) for name, of in experts.items()}
    rope = raw.get("rope_parameters") or {}
    for kind in ("short", "long"):
        if f"{kind}_factor" in rope:
            found[f"rope_factors_{kind}.weight"] = torch.tensor(rope[f"{kind}_factor"])
    return found


def _add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, vocab_size: int, pre: str) -> None:
    """GPT-2's bytes and merges, of the tokenizer in the folder."""
    raw = json.loads((model_dir / "tokenizer.json").read_text())
    tokens = {i: token for token, i in raw["model"]["vocab"].items()}
    added = {token["id"]: token for token in raw["added_tokens"]}
    tokens |= {i: token["content"] for i, token in added.items()}
    kinds = {i: gguf.TokenType.CONTROL if of["special"] else gguf.TokenType.USER_DEFINED for i, of in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    nothing = gguf.TokenType.UNUSED
    writer.add_token_types([kinds.get(i, gguf.TokenType.NORMAL if i in tokens else nothing) for i in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(gguf_models.TEMPLATE)
