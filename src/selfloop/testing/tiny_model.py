"""A model small enough to be made, loaded and trained within seconds: its answers mean nothing, its losses fall."""

import json
from pathlib import Path
from typing import Any

MAX_POSITIONS = 2048
"""The longest sequence, in tokens; a token is a byte."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VOCAB_SIZE, _HIDDEN, _INTERMEDIATE, _NUM_LAYERS, _NUM_HEADS, _NUM_KV_HEADS = 264, 64, 128, 2, 4, 2
# Conversations as most small models write them, with tools as JSON.
_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\n<tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama of 0.1 million parameters, with a tokenizer of bytes and a chat template, into ``folder``.

    Args:
        folder: made if it is missing; a Hugging Face folder afterwards (float32 safetensors).
        seed: of the weights; the same seed gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = _SPECIAL.index("<|im_end|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _NUM_LAYERS,
        "num_attention_heads": _NUM_HEADS,
        "num_key_value_heads": _NUM_KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": end,
        "pad_token_id": 0,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[end],
        "pad_token": _SPECIAL[0],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    _write_tokenizer(folder / "tokenizer.json")
    _write_weights(folder / "model.safetensors", seed)
    return folder


def _write_tokenizer(file: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*_SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(file))


def _write_weights(file: Path, seed: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    head_dim = _HIDDEN // _NUM_HEADS

    def matrix(rows: int, columns: int, scale: float = 0.1) -> Any:
        return (random.standard_normal((rows, columns)) * scale).astype(np.float32)

    def norm() -> Any:
        return (1 + random.standard_normal(_HIDDEN) * 0.1).astype(np.float32)

    # The output layer is frozen: it must be able to say a token with certainty, or no training could teach that.
    tensors = {
        "model.embed_tokens.weight": matrix(_VOCAB_SIZE, _HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(_VOCAB_SIZE, _HIDDEN, 0.3),
    }
    for index in range(_NUM_LAYERS):
        layer = f"model.layers.{index}."
        tensors |= {
            f"{layer}input_layernorm.weight": norm(),
            f"{layer}post_attention_layernorm.weight": norm(),
            f"{layer}self_attn.q_proj.weight": matrix(_HIDDEN, _HIDDEN),
            f"{layer}self_attn.k_proj.weight": matrix(_NUM_KV_HEADS * head_dim, _HIDDEN),
            f"{layer}self_attn.v_proj.weight": matrix(_NUM_KV_HEADS * head_dim, _HIDDEN),
            f"{layer}self_attn.o_proj.weight": matrix(_HIDDEN, _HIDDEN),
            f"{layer}mlp.gate_proj.weight": matrix(_INTERMEDIATE, _HIDDEN),
            f"{layer}mlp.up_proj.weight": matrix(_INTERMEDIATE, _HIDDEN),
            f"{layer}mlp.down_proj.weight": matrix(_HIDDEN, _INTERMEDIATE),
        }
    save_file(tensors, file, metadata={"format": "pt"})
