"""What the caller may use: models, teams, machines, and what it allows for itself."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from selfloop.control.capacity.placement import Capacity
from selfloop.control.resources.catalogue import Model
from selfloop.control.resources.user_config import UserConfig, checked_accelerators
from selfloop.server.management.render import instance_type
from selfloop.server.management.schemas.account import (
    EnablementDetailsV1,
    GetLoopsCapabilitiesResponseV1,
    GetLoopsUserConfigResponseV1,
    InstanceTypePricesV1,
    InstanceTypesV1,
    InstanceTypeWithPriceV1,
    LoopsUserConfigV1,
    PatchLoopsUserConfigRequestV1,
    PatchLoopsUserConfigResponseV1,
    SupportedModelV1,
    TeamsV1,
    TeamV1,
)
from selfloop.server.management.schemas.common import iso
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.types.vision import VisionFacts

router = APIRouter()

_CONFIG_FIELDS = {
    "trainer_accelerator_priority": "trainer_accelerators",
    "sampler_accelerator_priority": "sampler_accelerators",
}


@router.get("/loops/capabilities", summary="Base models that can be named, with their limits.")
async def capabilities(
    caller: CallerOf,
    control: ControlOf,
    model: Annotated[str | None, Query(description="Only this one; an unknown one gives an empty list.")] = None,
    use_case: Literal["rl", "sft"] = "rl",
    max_seq_len: Annotated[int | None, Query(ge=1, description="What you would create the run with.")] = None,
) -> GetLoopsCapabilitiesResponseV1:
    """`rl` needs a trainer and a sampler, `sft` a trainer: it says which list of your user config counts."""
    config = await control.user_configs.get(caller)
    excluded = control.user_configs.excludes(config, trainer=True, sampler=use_case == "rl")
    described = [m for m in await control.catalogue.described() if model is None or m.name == model]
    return GetLoopsCapabilitiesResponseV1(
        supported_models=[
            _supported(m, control.catalogue.missing(m), excluded, max_seq_len, control.capacity) for m in described
        ]
    )


def _supported(
    model: Model, missing: str | None, excluded: str | None, asked: int | None, capacity: Capacity
) -> SupportedModelV1:
    longest = model.max_position_embeddings
    details = None
    if missing is not None:
        details = EnablementDetailsV1(
            reason="model_unavailable", reason_detail=missing, remediation="Put it back, and see `selfloop doctor`."
        )
    elif excluded is not None:
        details = EnablementDetailsV1(
            reason="accelerator_not_allowed",
            reason_detail=excluded,
            remediation="PATCH /v1/loops/user_config with a list that has this machine's accelerator, or null.",
        )
    can_run = details is None
    if can_run and asked is not None and asked > longest:
        details = EnablementDetailsV1(
            reason="sequence_length_unsupported",
            reason_detail=f"the model has {longest} positions, {asked} were asked for",
            remediation=f"Ask for a max_seq_len of at most {longest}.",
        )
    return SupportedModelV1(
        model_name=model.name,
        max_seq_len=longest,
        max_enabled_seq_len=longest if can_run else 0,
        max_context_length=longest,
        supports_vision_language=isinstance(model.vision, VisionFacts),
        enabled=details is None,
        serverless=details is None and capacity.takes(asked),
        enablement_details=details,
    )


@router.get("/loops/user_config", summary="What your key allows for its runs and samplers.")
async def get_user_config(caller: CallerOf, control: ControlOf) -> GetLoopsUserConfigResponseV1:
    return GetLoopsUserConfigResponseV1(user_config=_user_config(await control.user_configs.get(caller)))


@router.patch("/loops/user_config", summary="Change what your key allows: omit to leave, null to clear.")
async def patch_user_config(
    body: PatchLoopsUserConfigRequestV1, caller: CallerOf, control: ControlOf
) -> PatchLoopsUserConfigResponseV1:
    """A list that leaves this machine's accelerator out refuses new runs and samplers of this key."""
    changes = {
        column: checked_accelerators(field, getattr(body, field))
        for field, column in _CONFIG_FIELDS.items()
        if field in body.model_fields_set
    }
    return PatchLoopsUserConfigResponseV1(user_config=_user_config(await control.user_configs.patch(caller, changes)))


def _user_config(config: UserConfig) -> LoopsUserConfigV1:
    return LoopsUserConfigV1(
        trainer_accelerator_priority=config.trainer_accelerators,
        sampler_accelerator_priority=config.sampler_accelerators,
    )


@router.get("/teams", summary="The caller's teams.")
async def teams(
    caller: CallerOf,
    control: ControlOf,
    name: Annotated[str | None, Query(description="Only the one of this name.")] = None,
) -> TeamsV1:
    return TeamsV1(
        teams=[
            TeamV1(id=t.id, name=t.name, default=t.is_default, created_at=iso(t.created_at))
            for t in await control.access.teams_of(caller)
            if name is None or t.name == name
        ]
    )


@router.get("/instance_types", summary="The one there is: this machine.")
async def instance_types(caller: CallerOf) -> InstanceTypesV1:
    return InstanceTypesV1(instance_types=[instance_type()])


@router.get("/instance_type_prices", summary="What this machine costs: nothing.")
async def instance_type_prices(caller: CallerOf) -> InstanceTypePricesV1:
    return InstanceTypePricesV1(instance_types=[InstanceTypeWithPriceV1(instance_type=instance_type())])
