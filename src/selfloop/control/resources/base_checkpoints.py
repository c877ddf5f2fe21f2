"""Base checkpoints: pinned revisions of a hub's models, each of which the catalogue has as a model of its own."""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from selfloop.control.resources.catalogue import Catalogue
from selfloop.types.errors import BadRequest
from selfloop.types.resources import CatalogueEntry
from selfloop.types.text_half import text_half

_FIELD = "base_checkpoint"
_FORM = re.compile(r"hf://([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(?:@([^@\s]+))?")
# Of config.json: fine-tuned weights of a model may differ in their vocabulary, not in these.
_ARCHITECTURE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


async def by_model(catalogue: Catalogue) -> Mapping[str, str]:
    """The ``hf://<org>/<repo>@<revision>`` of each model that was added at a revision, by the model's own name."""
    models, _ = await catalogue.entries()
    return {row.name: uri for row in models if (uri := _uri(row)) is not None}


async def folder(catalogue: Catalogue, repo: str, revision: str) -> Path | None:
    """The prepared folder of a pinned revision; None where the catalogue has no such."""
    name = await _named(catalogue, f"hf://{repo}@{revision}")
    return None if name is None else await catalogue.stored_folder(name)


async def served_as(catalogue: Catalogue, asked: str, base_model: str) -> str:
    """The name under which a base checkpoint is served here, for a run that asks for it with ``base_model``.

    A length in ``base_model`` (``<name>:peft:<context>``) is kept.

    Raises:
        BadRequest: a malformed one, one that is not pinned or not in the catalogue, with those that are; or one of
            another architecture than ``base_model``.
    """
    form = _FORM.fullmatch(asked)
    name = None if form is None or form[2] is None else await _named(catalogue, asked)
    if name is None:
        known = ", ".join((await by_model(catalogue)).values()) or "none"
        raise BadRequest(
            _FIELD,
            f"hf://<org>/<repo>@<revision> of a model that was added at that revision, got {asked!r}. Known here: "
            f"{known}. Add one with `selfloop models add <org>/<repo> --revision <revision> --name <name>`",
        )
    expected, found = [await _architecture(catalogue, model) for model in (base_model, name)]
    if found != expected:
        differs = ", ".join(f"{key} {found[key]} for {expected[key]}" for key in found if found[key] != expected[key])
        raise BadRequest(_FIELD, f"a checkpoint of the architecture of {base_model}; {asked} has {differs}")
    _, colon, length = base_model.partition(":")
    return f"{name}{colon}{length}"


async def _named(catalogue: Catalogue, uri: str) -> str | None:
    # Two names may have been given to one revision: the older one, always.
    return next((name for name, known in (await by_model(catalogue)).items() if known == uri), None)


async def _architecture(catalogue: Catalogue, model: str) -> Mapping[str, Any]:
    path = await catalogue.stored_folder(model)
    if path is None:
        raise BadRequest("base_model", f"a model whose files are here, to compare with; {model} is not prepared yet")
    try:
        content = await asyncio.to_thread((path / "config.json").read_bytes)
        config = text_half(msgspec.json.decode(content, type=dict[str, Any]))
    except (OSError, msgspec.MsgspecError) as error:
        raise BadRequest(_FIELD, f"models with a config.json to compare; that of {model}: {error}") from error
    return {key: config.get(key) for key in _ARCHITECTURE}


def _uri(row: CatalogueEntry) -> str | None:
    kind, _, repo = row.source.partition(":")
    return f"hf://{repo}@{row.revision}" if kind == "hub" and row.revision is not None else None
