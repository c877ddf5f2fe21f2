"""Shape of a decoder, read from a Hugging Face ``config.json``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfloop.engine.models.families import FAMILIES
from selfloop.engine.models.rope import RopeConfig, parse_rope
from selfloop.types.errors import OperationFailed


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the decoder must know of a model; sizes count elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]


def read_config(model_dir: Path) -> ModelConfig:
    """Parse ``config.json`` (and ``generation_config.json``, where end tokens are taken from if it is there).

    Raises:
        OperationFailed: the folder holds no model, or one that this engine does not compute exactly.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise OperationFailed(f"{model_dir} holds no config.json")
    raw: dict[str, Any] = json.loads(path.read_text())
    generation_path = model_dir / "generation_config.json"
    generation: dict[str, Any] = json.loads(generation_path.read_text()) if generation_path.is_file() else {}
    return parse_config(raw, generation)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """The pure half of :func:`read_config`."""
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise OperationFailed(f"model_type {model_type!r} is not supported; known: {sorted(FAMILIES)}")
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise OperationFailed(f"config.json lacks {missing}")
    _refuse_unsupported(raw)
    traits = FAMILIES[model_type](raw)
    context = int(raw["max_position_embeddings"])
    if traits.sliding_window is not None and traits.sliding_window < context:
        raise OperationFailed(
            f"sliding window attention ({traits.sliding_window} of {context} positions) is not supported"
        )
    num_heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or raw["hidden_size"] // num_heads)
    return ModelConfig(
        model_type=model_type,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=traits.qkv_bias,
        o_bias=traits.o_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        rope=parse_rope(raw, head_dim),
        eos_token_ids=_end_tokens(generation) or _end_tokens(raw),
    )


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise OperationFailed(f"hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    if raw.get("quantization_config") is not None:
        raise OperationFailed("quantized base weights are not supported")


def _end_tokens(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
