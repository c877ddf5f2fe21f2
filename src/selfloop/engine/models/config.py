"""Shape of a decoder, read from a Hugging Face ``config.json``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfloop.engine.models.families import FAMILIES
from selfloop.engine.models.rope import RopeConfig, parse_rope
from selfloop.engine.models.traits import FamilyTraits
from selfloop.types.errors import BadRequest, model_invalid
from selfloop.types.model_weights import read_weights


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the decoder must know of a model; sizes count elements.

    ``tie_word_embeddings`` tells whether the output layer is the embedding: what the weights say, where they are read.
    """

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
        raise model_invalid(f"{model_dir} holds no config.json")
    generation_path = model_dir / "generation_config.json"
    generation = _read_object(generation_path) if generation_path.is_file() else {}
    config = parse_config(_read_object(path), generation)
    try:
        weights = read_weights(model_dir, tie=config.tie_word_embeddings)
    except BadRequest as error:
        raise model_invalid(error.expected) from error
    return replace(config, tie_word_embeddings=weights.tied)


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """What a ``config.json`` alone says.

    Raises:
        OperationFailed: it says no model that this engine computes exactly.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise model_invalid(f"model_type {model_type!r} is not supported; known: {sorted(FAMILIES)}")
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise model_invalid(f"config.json lacks {missing}")
    sizes = {name: _size(name, raw[name]) for name in _REQUIRED}
    _refuse_unsupported(raw)
    traits = FAMILIES[model_type](raw)
    context = sizes["max_position_embeddings"]
    if traits.sliding_window is not None and traits.sliding_window < context:
        window = f"{traits.sliding_window} of {context} positions"
        raise model_invalid(f"sliding window attention ({window}) is not supported")
    num_heads, num_kv_heads, head_dim = _heads(raw, sizes, traits)
    generated_ends, own_ends = _end_tokens(generation), _end_tokens(raw)
    return ModelConfig(
        model_type=model_type,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=traits.qkv_bias,
        o_bias=traits.o_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        rope=_rope(raw, head_dim),
        eos_token_ids=generated_ends or own_ends,
    )


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Of one tensor's side; what is beyond is no model but an attempt to take the memory.
_MAX_SIZE = 2**31


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise model_invalid(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise model_invalid(f"{path} cannot be read: it holds no object")
    return raw


def _heads(raw: Mapping[str, Any], sizes: Mapping[str, int], traits: FamilyTraits) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and their size; an explicit null is as if the family had no default."""
    num_heads = sizes["num_attention_heads"]
    kv_heads, head_dim = raw.get("num_key_value_heads", traits.num_kv_heads), raw.get("head_dim", traits.head_dim)
    num_kv_heads = num_heads if kv_heads is None else _size("num_key_value_heads", kv_heads)
    dim = sizes["hidden_size"] // num_heads if head_dim is None else _size("head_dim", head_dim)
    if num_heads % num_kv_heads != 0:
        raise model_invalid(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    if dim < 2 or dim % 2 != 0:
        raise model_invalid(f"heads of {dim} dimensions cannot be rotated; an even number is needed")
    return num_heads, num_kv_heads, dim


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise model_invalid(f"config.json: {name} must be a positive integer, is {value!r}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise model_invalid(f"config.json: {name} must be a number of at least 0, is {value!r}")
    return float(value)


def _rope(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    try:
        return parse_rope(raw, head_dim)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise model_invalid(f"config.json: the rope parameters cannot be read: {error}") from error


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise model_invalid(f"hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    if raw.get("quantization_config") is not None:
        raise model_invalid("quantized base weights are not supported")
    if raw.get("transformers_weights") is not None:
        raise model_invalid(f"transformers_weights {raw['transformers_weights']!r} is not supported")


def _end_tokens(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids: list[Any] = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise model_invalid(f"eos_token_id must be a token id or a list of them, is {value!r}")
    return tuple(ids)
