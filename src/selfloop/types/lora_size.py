"""How large a run's files will be, from the model's ``config.json`` alone."""

from functools import lru_cache
from pathlib import Path

import msgspec

from selfloop.types.lora import LoraTargets

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
    shape = _read(model_dir / "config.json")
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
