"""Trainer deployments; and training jobs, containers that the hosted service runs and this server does not."""

from fastapi import APIRouter, Response

from selfloop.control.resources.listings import Cut, Part
from selfloop.control.resources.runs import DeploymentView
from selfloop.server.management.render import MemberOf, RenderOf, Scope
from selfloop.server.management.schemas.common import DeactivateLoopsDeploymentResponseV1
from selfloop.server.management.schemas.deployments import GetLoopsDeploymentResponseV1, ListLoopsDeploymentsResponseV1
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed
from selfloop.types.errors import BadRequest

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


@router.get("/training_projects", summary="Refused: this server runs no training jobs.")
@router.post("/training_projects", summary="Refused: this server runs no training jobs.")
@router.post("/teams/{team_id}/training_projects", summary="Refused: this server runs no training jobs.")
@router.get("/teams/{team_id}/secrets", summary="Refused: this server keeps no secrets for training jobs.")
async def no_training_jobs(caller: MemberOf) -> None:
    """The command line prints this message; the listing comes first, so that it has not promised anything yet."""
    raise BadRequest(
        "training_project",
        "not on this server: `truss loops exec` uploads a folder to an object store and runs it in a container, and "
        "there is neither here. Run the command where you are, without `truss loops exec --`: with LOOPS_BASE_URL and "
        "BASETEN_API_KEY set as `selfloop serve` prints them, it trains on this server",
    )
