"""Trainer deployments."""

from fastapi import APIRouter, Response

from selfloop.control.resources.listings import Cut, Part
from selfloop.control.resources.runs import DeploymentView
from selfloop.server.management.access import RenderOf, Scope
from selfloop.server.management.schemas.common import DeactivateLoopsDeploymentResponseV1
from selfloop.server.management.schemas.deployments import GetLoopsDeploymentResponseV1, ListLoopsDeploymentsResponseV1
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed

router = APIRouter()


@router.get("/loops/deployments", summary="List trainer deployments.", response_model=ListLoopsDeploymentsResponseV1)
async def list_deployments(
    caller: CallerOf, control: ControlOf, render: RenderOf, paging: PagingOf, scope: Scope = None
) -> Response:
    """Newest first."""

    async def fetch(cut: Cut) -> Part[DeploymentView]:
        return await control.runs.deployments(caller, cut, whole_team=scope == "org")

    return await listed(paging, "deployments", (caller.key_id, scope), fetch, render.deployment)


@router.get("/loops/deployments/{deployment_id}", summary="Get a trainer deployment.")
async def get_deployment(
    deployment_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> GetLoopsDeploymentResponseV1:
    return GetLoopsDeploymentResponseV1(
        deployment=render.deployment(await control.runs.deployment(caller, deployment_id))
    )


@router.post("/loops/deployments/{deployment_id}/deactivate", summary="Deactivate a deployment and its runs.")
async def deactivate_deployment(
    deployment_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> DeactivateLoopsDeploymentResponseV1:
    row = (await control.runs.deployment(caller, deployment_id)).deployment
    await control.runs.deactivate_deployment(caller, deployment_id)
    return DeactivateLoopsDeploymentResponseV1(id=row.id, base_model=row.base_model, user=render.user(row.key_id))
