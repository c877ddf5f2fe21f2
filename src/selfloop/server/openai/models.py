"""The names that a sampler answers to: its base model, and checkpoints of it."""

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints.pinned import uri_of
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.resources import Sampler

_CHECKPOINT = "bt://"


def entry(id: str, created_at: float, parent: str | None) -> dict[str, object]:
    """As OpenAI lists a model, with the ``parent`` by which Loops clients recognize an adapter."""
    return {
        "id": id,
        "object": "model",
        "created": int(created_at),
        "owned_by": "selfloop",
        "parent": parent,
    }


async def listed(sampler: Sampler, control: Control) -> list[dict[str, object]]:
    """The base model, the adapter that is live, and the other pinned checkpoints."""
    live = await control.samplers.live_path(sampler)
    pinned = [uri_of(row) for row in await control.samplers.served(sampler)]
    paths = [path for path in dict.fromkeys([live, *pinned]) if path is not None]
    base = entry(sampler.base_model, sampler.created_at, None)
    return [base, *(entry(path, sampler.created_at, sampler.base_model) for path in paths)]


async def pinned_by(name: str, sampler: Sampler, caller: Caller, control: Control) -> str | None:
    """The checkpoint that a model's name pins; None for the base model, which stands for what is live.

    Raises:
        NotFound: the name is of no model that this sampler serves.
    """
    if await control.samplers.served_named(sampler, name) is not None:
        return name
    try:
        if name.startswith(_CHECKPOINT):
            checkpoint = await control.checkpoints.readable_at(caller, name, "model")
            await control.catalogue.same_model(checkpoint.base_model, sampler.base_model, "model")
            return name
        await control.catalogue.same_model(name, sampler.base_model, "model")
    except (BadRequest, NotFound):
        hint = f"this sampler serves {sampler.base_model}, and bt:// paths of its checkpoints"
        raise NotFound("model", name[:200], hint) from None
    return None
