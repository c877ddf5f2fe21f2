"""The model families: of each ``model_type`` a file of that name here, with ``spec(config)``.

An installed package adds one with an entry point of the ``model_type``'s name in ``selfloop.model_families``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from selfloop.engine.models.config import HfConfig, read_object
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.stored import read_stored_spec
from selfloop.types.errors import BadRequest, model_invalid
from selfloop.types.model_folder import INSTALLED_FAMILIES, SUPPORTED_MODEL_TYPES
from selfloop.types.model_weights import read_weights
from selfloop.types.text_half import text_half


def read_spec(model_dir: Path) -> ModelSpec:
    """Of a folder's ``config.json`` (and ``generation_config.json``, where end tokens are taken from if it is there).

    Raises:
        OperationFailed: the folder holds no model, or one that no family describes exactly.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise model_invalid(f"{model_dir} holds no config.json")
    generation_path = model_dir / "generation_config.json"
    generation = read_object(generation_path) if generation_path.is_file() else {}
    raw = text_half(read_object(path))
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        return read_stored_spec(model_dir, raw, generation)
    spec = parse_spec(raw, generation)
    try:
        weights = read_weights(model_dir, tie=spec.tied)
    except BadRequest as error:
        raise model_invalid(error.expected) from error
    return replace(spec, tied=weights.tied)


def parse_spec(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelSpec:
    """What a ``config.json`` alone says.

    Raises:
        OperationFailed: it says no model that a family describes exactly.
    """
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise model_invalid(f"model_type {model_type!r} is not supported; known: {sorted(SUPPORTED_MODEL_TYPES)}")
    if model_type in INSTALLED_FAMILIES:
        make: Callable[[HfConfig], ModelSpec] = INSTALLED_FAMILIES[model_type].load()
    else:
        make = import_module(f"selfloop.engine.models.{model_type}").spec
    return make(HfConfig(raw, generation))
