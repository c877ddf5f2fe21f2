"""Models that only transformers describes: which types it knows, what their tensors say. Nothing is imported.

Both halves of the server ask here, so that a folder is refused before its weights are fetched.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from selfloop.types.safetensors_header import StoredTensor

_LIST, _LIST_FILE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", Path("models/auto/modeling_auto.py")
_MATRIX = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"model\.layers\.(\d+)\..+\.experts\.\d+\..+\.weight")
# Routers choose experts, and indexers what attention reads: these stay as they are. A matrix for each expert sees some
# of the tokens only.
# DeepSeek-V4's compressors see fewer rows than there are tokens, and its o_a_proj is no plain product.
_FROZEN = frozenset({"gate", "router", "shared_expert_gate", "experts", "indexer", "compressor", "o_a_proj"})
_FEED_FORWARD = re.compile(r"(^|[._])(mlp|ffn|feed_forward|moe|experts?|fc\d?)([._]|$)|^mixer\.(up|gate|down)_proj$")


# Classes under which others publish a model of theirs as it is; of any other class it is not known what was changed.
_BY_THEIR_CLASS = frozenset({"deepseek_v3"})

# Two names of the one number.
_CONTEXT = ("max_position_embeddings", "model_max_length")


class StoredProjection(NamedTuple):
    """A matrix W (out, in) of a layer that an adapter may be added to, by its module's path inside the layer."""

    layer: int
    name: str
    out_features: int
    in_features: int
    bias: bool
    part: Literal["attn", "mlp"]


@lru_cache(maxsize=1)
def _causal_models() -> Mapping[str, str] | None:
    """The class of every ``model_type`` of a causal language model of transformers; None where it is not installed."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return None
    tree = ast.parse((Path(found.origin).parent / _LIST_FILE).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == _LIST for t in node.targets):
            assert isinstance(node.value, ast.Call)
            pairs: list[tuple[str, str]] = ast.literal_eval(node.value.args[0])
            return {name: of for name, of in pairs if of.endswith("ForCausalLM")}
    return {}


def loaded_as(config: Mapping[str, Any]) -> str:
    """The ``model_type`` that transformers loads a model by: its own, or that of the class in ``architectures``.

    Kimi K2 is a DeepSeek-V3 under another name, whose folder brings code of its own for it.
    """
    model_type, known = str(config.get("model_type", "")), _causal_models() or {}
    named: object = config.get("architectures")
    if model_type in known or not model_type or not isinstance(named, list):
        return model_type
    classes = cast("list[object]", named)
    return next((name for name, of in known.items() if of in classes and name in _BY_THEIR_CLASS), model_type)


def why_unknown(config: Mapping[str, Any]) -> str | None:
    """Why transformers cannot load the model of a ``config.json`` by its own code; None where it can."""
    model_type, known = loaded_as(config), _causal_models()
    if not model_type:
        return "config.json, or its text_config, has no model_type"
    if known is not None and model_type in known:
        return None
    if "auto_map" in config:
        return f"model type {model_type!r} needs code of its own (auto_map), which is never run"
    if known is None:
        return f"model type {model_type!r} is not supported, and transformers, which may know it, is not installed"
    return f"model type {model_type!r} is not supported, and no causal language model of transformers"


OLD_NAMES_OF_LONGROPE = frozenset({"su", "yarn"})
"""In Phi-3's first releases."""


def context_of(config: Mapping[str, Any]) -> int | None:
    """How many positions a ``config.json`` says that its model has; None where it does not.

    The long factors of ``longrope`` hold for a whole batch as soon as one sequence of it passes the original context:
    beyond that a sequence has not the numbers that it has alone, nor a cache those of the whole. So that is the limit.
    """
    context = next((config[name] for name in _CONTEXT if isinstance(config.get(name), int)), None)
    rope: object = config.get("rope_parameters") or config.get("rope_scaling")
    if context is None or not isinstance(rope, dict):
        return context
    found = cast("dict[str, object]", rope)
    kinds = {found.get("rope_type"), found.get("type")}
    if "longrope" not in kinds and not (config.get("model_type") == "phi3" and kinds & OLD_NAMES_OF_LONGROPE):
        return context
    name = "original_max_position_embeddings"
    original = found.get(name, config.get(name))
    return min(context, original) if isinstance(original, int) else context


def stored_projections(tensors: Mapping[str, StoredTensor], num_layers: int | None) -> list[StoredProjection]:
    """Layer by layer, attention first, by name; layers from ``num_layers`` on, which are for drafting, are left out."""
    found: list[StoredProjection] = []
    for name, tensor in tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            continue
        layer, path = int(match[1]), match[2]
        if (num_layers is not None and layer >= num_layers) or not _FROZEN.isdisjoint(path.split(".")):
            continue
        bias = f"{name.removesuffix('weight')}bias" in tensors
        part = "mlp" if _FEED_FORWARD.search(path) else "attn"
        found.append(StoredProjection(layer, path, *tensor.shape, bias, part))
    return sorted(found, key=lambda projection: (projection.layer, projection.part, projection.name))


def expert_shapes(tensors: Mapping[str, StoredTensor], num_layers: int | None) -> list[tuple[int, ...]]:
    """(out, in) of each expert's matrices, in the first ``num_layers`` layers."""
    matches = {name: match for name in tensors if (match := _EXPERT.fullmatch(name)) is not None}
    return [
        tensors[name].shape
        for name, match in matches.items()
        if len(tensors[name].shape) == 2 and (num_layers is None or int(match[1]) < num_layers)
    ]


def num_stored_layers(names: Iterable[str]) -> int:
    """One more than the last layer that any tensor is of; 0 where there is none."""
    matches = (re.match(r"model\.layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
