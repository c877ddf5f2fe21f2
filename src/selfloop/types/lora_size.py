"""How large a run's files will be, from the model's ``config.json``, or the headers of its weights."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from selfloop.types.lora import LoraTargets
from selfloop.types.model_folder import EXPERTS_STAY, SUPPORTED_MODEL_TYPES
from selfloop.types.model_weights import EMBEDDING, read_weights
from selfloop.types.routes import ExpertCounts
from selfloop.types.stacked_weights import of_each_expert
from selfloop.types.text_half import text_half
from selfloop.types.transformers_models import expert_shapes, stored_projections

T = TypeVar("T")

# Families whose configuration gives every size, and whose projections lie each by itself.
_SAID_BY_CONFIG = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_FLOAT_BYTES = 4
# Configuration and card.
_HEADER_BYTES = 128 * 1024
# In a safetensors header: the names, shapes and offsets of A and B of one more matrix.
_NAME_BYTES = 512


class _Shape(msgspec.Struct):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None


class _Type(ExpertCounts):
    model_type: str = "llama"
    num_hidden_layers: int | None = None


class _Adapted(NamedTuple):
    """What a model's adapters are on."""

    parameters_per_rank: int
    num_matrices: int

    @classmethod
    def of(cls, sizes: list[int]) -> "_Adapted":
        """Of the input plus output size of each matrix."""
        return cls(sum(sizes), len(sizes))


def save_bytes(model_dir: Path, rank: int, targets: LoraTargets, *, with_optimizer: bool) -> int:
    """Bytes that a save writes, rounded up: float32 adapter, and as much again for each of the two moments."""
    copies, adapted = 3 if with_optimizer else 1, _adapted(model_dir, targets)
    each = _FLOAT_BYTES * rank * adapted.parameters_per_rank + _NAME_BYTES * adapted.num_matrices
    return copies * each + _HEADER_BYTES


def parameters_per_rank(model_dir: Path, targets: LoraTargets) -> int:
    """Trained numbers for each unit of rank: input plus output size of every adapted projection.

    Raises:
        OSError: the folder is gone.
        msgspec.MsgspecError: its configuration cannot be read.
        BadRequest: the headers of its weights cannot.
    """
    return _adapted(model_dir, targets).parameters_per_rank


def with_experts(model_dir: Path, targets: LoraTargets) -> LoraTargets:
    """What a new run adapts that asks for ``targets``: with the MLPs also the experts, where the model has some.

    Experts of models that transformers computes take no adapters, nor do those of :data:`EXPERTS_STAY`.

    Raises:
        OSError: the folder is gone.
        msgspec.MsgspecError: its configuration cannot be read.
    """
    kind = _read_type(model_dir)
    takes = kind.has_experts and kind.model_type in SUPPORTED_MODEL_TYPES - EXPERTS_STAY
    return msgspec.structs.replace(targets, experts=targets.mlp and takes)


def _read_type(model_dir: Path) -> _Type:
    return _read(model_dir / "config.json", _Type)


def _adapted(model_dir: Path, targets: LoraTargets) -> _Adapted:
    kind = _read_type(model_dir)
    if kind.model_type not in _SAID_BY_CONFIG or kind.has_experts:
        return _of_stored(model_dir, targets)
    shape = _read(model_dir / "config.json", _Shape)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    head_dim = shape.head_dim or hidden // shape.num_attention_heads
    heads = shape.num_attention_heads * head_dim
    kv_heads = (shape.num_key_value_heads or shape.num_attention_heads) * head_dim
    in_layer: list[int] = []
    if targets.attn:
        in_layer += [hidden + heads, hidden + kv_heads, hidden + kv_heads, heads + hidden]
    if targets.mlp:
        in_layer += 3 * [hidden + inner]
    return _Adapted.of(shape.num_hidden_layers * in_layer + ([hidden + shape.vocab_size] if targets.unembed else []))


@lru_cache(maxsize=64)
def _read(config: Path, type_: type[T]) -> T:
    raw = msgspec.json.decode(config.read_bytes(), type=dict[str, Any])
    return msgspec.convert(text_half(raw), type_)


@lru_cache(maxsize=64)
def _of_stored(model_dir: Path, targets: LoraTargets) -> _Adapted:
    """By the matrices that lie in the folder, where the configuration alone does not say them."""
    num_layers = _read_type(model_dir).num_hidden_layers
    tensors = read_weights(model_dir, tie=True).tensors
    asked = {"attn": targets.attn, "mlp": targets.mlp}
    sizes = [p.in_features + p.out_features for p in stored_projections(tensors, num_layers) if asked[p.part]]
    if targets.experts:
        sizes += [sum(shape) for shape in expert_shapes(of_each_expert(tensors, ()), num_layers)]
    return _Adapted.of(sizes + ([sum(tensors[EMBEDDING].shape)] if targets.unembed else []))
