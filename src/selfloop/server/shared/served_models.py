"""The models of the whole server by name: base models of the catalogue, and checkpoints that the caller may read."""

from typing import NamedTuple

from fastapi import Request

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.shared.sampling import check_identity
from selfloop.server.shared.tinker_paths import URI_FORM, checkpoint_path, is_path, our_path
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.resources import Sampler
from selfloop.types.status import CheckpointTarget

_HINT = f"a base model of this server, or {URI_FORM} (or bt://...) of a checkpoint of your team or a published one"
_MAX_LISTED = 1000


class Named(NamedTuple):
    """What a model's name stands for: a base model, and a checkpoint's ``bt://`` path if it names one."""

    base_model: str
    path: str | None
    created_at: float


class Target(NamedTuple):
    """Who serves a request: a sampler, and the checkpoint that is pinned on it by its ``bt://`` path."""

    sampler: Sampler
    pinned: str | None


class Listed(NamedTuple):
    """A model as lists show it; ``parent`` is a checkpoint's base model."""

    id: str
    created_at: float
    parent: str | None


async def named(name: str, caller: Caller, control: Control) -> Named:
    """What ``<base model>``, ``<checkpoint path>`` or ``<base model>;<checkpoint path>`` stands for.

    Raises:
        NotFound: there is no such model.
        BadRequest: the checkpoint is of another base model than the one beside it.
    """
    base, path = _parts(name)
    created_at = 0.0
    if base is not None:
        created_at = await _created_at(base, name, control)
        if path is None:
            return Named(base, None, created_at)
    assert path is not None
    try:
        checkpoint = await control.checkpoints.readable_at(caller, our_path(path, "model"), "model")
    except (BadRequest, NotFound):
        raise NotFound("model", name[:200], _HINT) from None
    if base is not None:
        await control.catalogue.same_model(checkpoint.base_model, base, "model")
    return Named(checkpoint.base_model, our_path(path, "model"), checkpoint.created_at)


async def target_of(request: Request, name: str, caller: Caller, control: Control) -> Target:
    """Who serves the request, which names the model ``name``. Raises as :func:`named` does."""
    meant = await named(name, caller, control)
    if "x-min-policy-version" in request.headers:
        raise BadRequest("X-Min-Policy-Version", "none: only the sampler of a run has versions")
    sampler = await control.shared_samplers.of(caller, meant.base_model, "model")
    control.samplers.check_live(sampler)
    check_identity(request, sampler)
    return Target(sampler, meant.path)


async def listed(caller: Caller, control: Control) -> list[Listed]:
    """Base models with their aliases, then the team's newest checkpoints for samplers, at most a thousand."""
    models, aliases = await control.catalogue.entries()
    created = {row.name: row.created_at for row in models}
    bases = [*created, *(row.alias for row in aliases)]
    created |= {row.alias: created[row.model_name] for row in aliases}
    checkpoints = await control.checkpoints.newest(caller, CheckpointTarget.SAMPLER, _MAX_LISTED)
    return [
        *(Listed(name, created[name], None) for name in bases),
        *(
            Listed(checkpoint_path(row.run_id, CheckpointTarget.SAMPLER, row.name), row.created_at, row.base_model)
            for row in checkpoints
        ),
    ]


def _parts(name: str) -> tuple[str | None, str | None]:
    if is_path(name):
        return None, name
    base, separator, path = name.partition(";")
    return base, path if separator else None


async def _created_at(base: str, name: str, control: Control) -> float:
    models, aliases = await control.catalogue.entries()
    own = next((row.model_name for row in aliases if row.alias == base), base)
    row = next((row for row in models if row.name == own), None)
    if row is None:
        known = ", ".join(row.name for row in models)
        raise NotFound("model", name[:200], f"{_HINT}; base models here: {known}")
    return row.created_at
