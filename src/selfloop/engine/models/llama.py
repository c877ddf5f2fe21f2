"""Llama (and SmolLM2): biases as the config says."""

from collections.abc import Mapping
from typing import Any

from selfloop.engine.models.traits import FamilyTraits


def traits(raw: Mapping[str, Any]) -> FamilyTraits:
    attention_bias = bool(raw.get("attention_bias", False))
    return FamilyTraits(qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=bool(raw.get("mlp_bias", False)))
