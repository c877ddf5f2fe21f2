"""Models: the names that checkpoints are deployed under, and the deployments behind samplers."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.deployments import ModelView
from selfloop.control.resources.listings import Cut, Part
from selfloop.server.management.render import MemberOf, RenderOf
from selfloop.server.management.schemas.models import (
    DeactivateResponseV1,
    DeploymentsV1,
    DeploymentV1,
    ModelsV1,
    ModelV1,
)
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed

router = APIRouter()

# The clients ask again only after 10 s, so a status that is about to change is worth waiting for.
_READINESS_HOLD_S = 25.0
# Asks only when it is about to sample: if a sampler sleeps it wakes it, then pauses for 10 s whatever comes.
_ABOUT_TO_SAMPLE = "baseten-loops/"


@router.get("/models", summary="List the models that checkpoints were deployed under.", response_model=ModelsV1)
@router.get(
    "/teams/{team_id}/models",
    summary="List a team's models that checkpoints were deployed under.",
    response_model=ModelsV1,
)
async def list_models(
    caller: MemberOf,
    control: ControlOf,
    render: RenderOf,
    paging: PagingOf,
    name: Annotated[str | None, Query(description="Only the one of this name.")] = None,
) -> Response:
    """Newest first."""
    team = await _team_name(control, caller)

    async def fetch(cut: Cut) -> Part[ModelView]:
        return await control.deploys.models(caller, cut, name)

    return await listed(paging, "models", (caller.team_id, name), fetch, lambda view: render.model(view, team))


@router.get("/models/{model_id}", summary="Get a model, also the one under a sampler.")
async def get_model(model_id: str, caller: CallerOf, control: ControlOf, render: RenderOf) -> ModelV1:
    return render.model(await control.deploys.model(caller, model_id), await _team_name(control, caller))


@router.get(
    "/models/{model_id}/deployments",
    summary="List a model's deployments, newest first.",
    response_model=DeploymentsV1,
)
async def list_model_deployments(
    model_id: str,
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    paging: PagingOf,
    name: str | None = None,
) -> Response:
    async def fetch(cut: Cut) -> Part[DeploymentV1]:
        versions = await control.deploys.versions(caller, model_id, cut)
        shown = [render.model_deployment(version) for version in versions.rows]
        return Part([d for d in shown if name is None or d.name == name], versions.next)

    return await listed(paging, "deployments", (caller.team_id, model_id, name), fetch, lambda shown: shown)


@router.get("/models/{model_id}/deployments/{deployment_id}", summary="A sampler as a deployment; its readiness.")
async def readiness(
    model_id: str,
    deployment_id: str,
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    user_agent: Annotated[str, Header(include_in_schema=False)] = "",
) -> DeploymentV1:
    """The sampler's status; one that is coming up is waited for, up to 25 s. The Loops client's question wakes it."""
    sampler_id = (await control.deploys.version(caller, model_id, deployment_id)).sampler.id
    if control.lifecycle.is_asleep(sampler_id) and user_agent.startswith(_ABOUT_TO_SAMPLE):
        await asyncio.wait({control.lifecycle.wake_soon(sampler_id)}, timeout=_READINESS_HOLD_S)
    else:
        await control.lifecycle.wait_until_stable(sampler_id, _READINESS_HOLD_S)
    return render.model_deployment(await control.deploys.version(caller, model_id, deployment_id))


@router.post("/models/{model_id}/deployments/{deployment_id}/deactivate", summary="Deactivate a model's deployment.")
async def deactivate_model_deployment(
    model_id: str, deployment_id: str, caller: CallerOf, control: ControlOf
) -> DeactivateResponseV1:
    """Ends the samplers behind it; `no_op` says that it had ended before."""
    ended = await control.samplers.deactivate_version(caller, model_id, deployment_id)
    return DeactivateResponseV1(no_op=not ended)


async def _team_name(control: Control, caller: Caller) -> str:
    return next(team.name for team in await control.access.teams_of(caller))
