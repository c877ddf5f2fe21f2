"""Qwen3: RMSNorm on every head of q and k before the rotation."""

from collections.abc import Mapping
from typing import Any

from selfloop.engine.models.traits import FamilyTraits, qwen_sliding_window


def traits(raw: Mapping[str, Any]) -> FamilyTraits:
    attention_bias = bool(raw.get("attention_bias", False))
    return FamilyTraits(
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_window=qwen_sliding_window(raw),
        num_kv_heads=32,
        head_dim=128,
    )
