"""Samplers, and the readiness that clients poll."""

from fastapi import APIRouter, Response

from selfloop.control.resources.listings import Cut, Part
from selfloop.control.resources.samplers import exactly_one
from selfloop.server.management.render import (
    MemberOf,
    RenderOf,
    Scope,
    refuse_replicas,
    refuse_spot,
    refuse_with_serverless,
)
from selfloop.server.management.schemas.common import DeactivateLoopsSamplerResponseV1
from selfloop.server.management.schemas.samplers import (
    CreateLoopsSamplerRequestV1,
    CreateLoopsSamplerResponseV1,
    GetLoopsSamplerResponseV1,
    ListLoopsSamplersResponseV1,
)
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed
from selfloop.types.errors import BadRequest
from selfloop.types.resources import Sampler

router = APIRouter()


@router.post("/loops/samplers", summary="Create a Loops sampler.")
@router.post("/teams/{team_id}/loops/samplers", summary="Create a Loops sampler in a team.")
@router.post("/loops/debug/samplers", summary="The same: where the client posts a sampler that has a scope.")
@router.post("/teams/{team_id}/loops/debug/samplers", summary="The same in a team.")
async def create_sampler(
    body: CreateLoopsSamplerRequestV1, caller: MemberOf, control: ControlOf, render: RenderOf
) -> CreateLoopsSamplerResponseV1:
    """A sampler paired with a run (one a run), or a standalone one of a base model or a checkpoint."""
    if body.scope == "serverless":
        refuse_with_serverless(body.availability_model, {"num_replicas": body.num_replicas})
    refuse_spot(body.availability_model)
    refuse_replicas("num_replicas", body.num_replicas)
    exactly_one(run_id=body.run_id, base_model=body.base_model, model_path=body.model_path)
    if body.run_id is not None:
        for field in ("max_seq_length", "reuse_from_session_id"):
            if getattr(body, field) is not None:
                raise BadRequest(field, "null with run_id: a paired sampler serves as its run does")
        if body.scope != "default":
            raise BadRequest("scope", "default with run_id: a paired sampler has the capacity of its run")
        row = await control.samplers.create_paired(caller, body.session_id, body.run_id)
    else:
        row = await control.samplers.create_standalone(
            caller,
            body.session_id,
            base_model=body.base_model,
            model_path=body.model_path,
            max_seq_len=body.max_seq_length,
            reuse_from_session_id=body.reuse_from_session_id,
            scope=body.scope,
        )
    return CreateLoopsSamplerResponseV1(sampler=render.sampler(row))


@router.get("/loops/samplers", summary="List Loops samplers.", response_model=ListLoopsSamplersResponseV1)
@router.get(
    "/teams/{team_id}/loops/samplers",
    summary="List a team's Loops samplers.",
    response_model=ListLoopsSamplersResponseV1,
)
async def list_samplers(
    caller: MemberOf, control: ControlOf, render: RenderOf, paging: PagingOf, scope: Scope = None
) -> Response:
    """Newest first."""

    async def fetch(cut: Cut) -> Part[Sampler]:
        return await control.samplers.list(caller, cut, whole_team=scope == "org")

    return await listed(paging, "samplers", (caller.key_id, scope), fetch, render.sampler)


@router.get("/loops/samplers/{sampler_id}", summary="Get a Loops sampler.")
async def get_sampler(
    sampler_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> GetLoopsSamplerResponseV1:
    return GetLoopsSamplerResponseV1(sampler=render.sampler(await control.samplers.get(caller, sampler_id)))


@router.post("/loops/samplers/{sampler_id}/deactivate", summary="Deactivate a Loops sampler.")
async def deactivate_sampler(
    sampler_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> DeactivateLoopsSamplerResponseV1:
    row = await control.samplers.deactivate(caller, sampler_id)
    return DeactivateLoopsSamplerResponseV1(id=row.id, base_model=row.base_model, user=render.user(row.key_id))
