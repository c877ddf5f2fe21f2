"""Qwen2 and Qwen2.5: biases on q, k and v."""

from collections.abc import Mapping
from typing import Any

from selfloop.engine.models.traits import FamilyTraits, qwen_sliding_window


def traits(raw: Mapping[str, Any]) -> FamilyTraits:
    return FamilyTraits(qkv_bias=True, sliding_window=qwen_sliding_window(raw), num_kv_heads=32)
