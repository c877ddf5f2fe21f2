"""The model families by ``model_type``: one line each; what differs is in the family's own file."""

from collections.abc import Callable, Mapping
from typing import Any

from selfloop.engine.models import llama, mistral, qwen2, qwen3
from selfloop.engine.models.traits import FamilyTraits

FAMILIES: dict[str, Callable[[Mapping[str, Any]], FamilyTraits]] = {
    "llama": llama.traits,
    "mistral": mistral.traits,
    "qwen2": qwen2.traits,
    "qwen3": qwen3.traits,
}
