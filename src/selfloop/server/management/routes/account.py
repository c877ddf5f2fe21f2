"""What the caller may use: models and teams."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from selfloop.server.auth import CallerOf, ControlOf
from selfloop.server.management import schemas as s

router = APIRouter()


@router.get("/loops/capabilities", summary="Base models that can be named, with their limits.")
async def capabilities(
    caller: CallerOf,
    control: ControlOf,
    model: str | None = None,
    use_case: Literal["rl", "sft"] | None = None,
    max_seq_len: Annotated[int | None, Query(ge=1)] = None,
) -> s.CapabilitiesResponseV1:
    """``use_case`` changes nothing here: every model can be trained and sampled."""
    models = [
        m
        for m in await control.catalogue.described()
        if (model is None or m.name == model) and (max_seq_len is None or m.max_position_embeddings >= max_seq_len)
    ]
    return s.CapabilitiesResponseV1(
        supported_models=[
            s.SupportedModelV1(
                model_name=m.name,
                max_seq_len=m.max_position_embeddings,
                max_enabled_seq_len=m.max_position_embeddings,
                max_context_length=m.max_position_embeddings,
            )
            for m in models
        ]
    )


@router.get("/teams", summary="The caller's teams.")
async def teams(caller: CallerOf, control: ControlOf) -> s.TeamsResponseV1:
    return s.TeamsResponseV1(
        teams=[
            s.TeamV1(id=t.id, name=t.name, default=t.is_default, created_at=s.iso(t.created_at))
            for t in await control.access.teams_of(caller)
        ]
    )
