"""How large a run's files will be, from the model's ``config.json``, or the headers of its weights."""

from functools import lru_cache
from pathlib import Path

import msgspec

from selfloop.types.lora import LoraTargets
from selfloop.types.model_folder import SUPPORTED_MODEL_TYPES
from selfloop.types.model_weights import EMBEDDING, read_weights
from selfloop.types.transformers_models import stored_projections

_FLOAT_BYTES = 4
# Tensor names and shapes in the safetensors headers, configuration and card.
_HEADER_BYTES = 256 * 1024


class _Shape(msgspec.Struct):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None


class _Type(msgspec.Struct):
    model_type: str = "llama"
    num_hidden_layers: int | None = None


def save_bytes(model_dir: Path, rank: int, targets: LoraTargets, *, with_optimizer: bool) -> int:
    """Bytes that a save writes, rounded up: float32 adapter, and as much again for each of the two moments."""
    copies = 3 if with_optimizer else 1
    return copies * _FLOAT_BYTES * rank * parameters_per_rank(model_dir, targets) + _HEADER_BYTES


def parameters_per_rank(model_dir: Path, targets: LoraTargets) -> int:
    """Trained numbers for each unit of rank: input plus output size of every adapted projection.

    Raises:
        OSError: the folder is gone.
        msgspec.MsgspecError: its configuration cannot be read.
    """
    config = model_dir / "config.json"
    if msgspec.json.decode(config.read_bytes(), type=_Type).model_type not in SUPPORTED_MODEL_TYPES:
        return _of_stored(model_dir, targets)
    shape = _read(config)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    head_dim = shape.head_dim or hidden // shape.num_attention_heads
    heads = shape.num_attention_heads * head_dim
    kv_heads = (shape.num_key_value_heads or shape.num_attention_heads) * head_dim
    attn = 2 * (hidden + heads) + 2 * (hidden + kv_heads)
    mlp = 3 * (hidden + inner)
    in_layer = (attn if targets.attn else 0) + (mlp if targets.mlp else 0)
    unembed = hidden + shape.vocab_size if targets.unembed else 0
    return shape.num_hidden_layers * in_layer + unembed


@lru_cache(maxsize=64)
def _read(config: Path) -> _Shape:
    return msgspec.json.decode(config.read_bytes(), type=_Shape)


@lru_cache(maxsize=64)
def _of_stored(model_dir: Path, targets: LoraTargets) -> int:
    """By the matrices that lie in the folder, where the configuration alone does not say them."""
    num_layers = msgspec.json.decode((model_dir / "config.json").read_bytes(), type=_Type).num_hidden_layers
    tensors = read_weights(model_dir, tie=True).tensors
    asked = {"attn": targets.attn, "mlp": targets.mlp}
    projections = [p for p in stored_projections(tensors, num_layers) if asked[p.part]]
    return sum(p.in_features + p.out_features for p in projections) + (
        sum(tensors[EMBEDDING].shape) if targets.unembed else 0
    )
