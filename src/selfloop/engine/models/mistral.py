"""Mistral: Llama without biases, and in early releases a sliding window on every layer."""

from collections.abc import Mapping
from typing import Any

from selfloop.engine.models.traits import FamilyTraits


def traits(raw: Mapping[str, Any]) -> FamilyTraits:
    # An absent key means 4096 to transformers; null means none.
    return FamilyTraits(sliding_window=raw.get("sliding_window", 4096), num_kv_heads=8)
