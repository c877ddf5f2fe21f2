"""In what one family of decoders may differ from another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FamilyTraits:
    """Differences between families; ``sliding_window`` is None when every layer sees the whole context.

    ``num_kv_heads`` and ``head_dim`` are what transformers takes where the config has no such key; None: what follows
    from the other sizes.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None


def qwen_sliding_window(raw: Mapping[str, Any]) -> int | None:
    """The window of a Qwen config, where any layer uses it."""
    if not raw.get("use_sliding_window", False):
        return None
    num_layers = raw["num_hidden_layers"]
    layer_types = raw.get("layer_types")
    if layer_types is None:
        in_force = raw.get("max_window_layers", 28) < num_layers
    else:
        in_force = "sliding_attention" in layer_types
    return raw.get("sliding_window", 4096) if in_force else None
