"""Trainer deployments."""

from fastapi import APIRouter

from selfloop.control.resources.runs import RunView
from selfloop.server.auth import CallerOf, ControlOf
from selfloop.server.management.access import RenderOf, Scope
from selfloop.server.management.schemas.common import DeactivateLoopsDeploymentResponseV1
from selfloop.server.management.schemas.deployments import GetLoopsDeploymentResponseV1, ListLoopsDeploymentsResponseV1

router = APIRouter()


@router.get("/loops/deployments", summary="List trainer deployments.")
async def list_deployments(
    caller: CallerOf, control: ControlOf, render: RenderOf, scope: Scope = None
) -> ListLoopsDeploymentsResponseV1:
    rows = await control.runs.deployments(caller, whole_team=scope == "org")
    views = await control.runs.list(caller, run_id=None, base_model=None, whole_team=True)
    by_deployment: dict[str, list[RunView]] = {}
    for view in views:
        by_deployment.setdefault(view.run.deployment_id, []).append(view)
    return ListLoopsDeploymentsResponseV1(
        deployments=[render.deployment(row, by_deployment.get(row.id, [])) for row in rows]
    )


@router.get("/loops/deployments/{deployment_id}", summary="Get a trainer deployment.")
async def get_deployment(
    deployment_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> GetLoopsDeploymentResponseV1:
    row, views = await control.runs.deployment(caller, deployment_id)
    return GetLoopsDeploymentResponseV1(deployment=render.deployment(row, list(views)))


@router.post("/loops/deployments/{deployment_id}/deactivate", summary="Deactivate a deployment and its runs.")
async def deactivate_deployment(
    deployment_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> DeactivateLoopsDeploymentResponseV1:
    row, _views = await control.runs.deployment(caller, deployment_id)
    await control.runs.deactivate_deployment(caller, deployment_id)
    return DeactivateLoopsDeploymentResponseV1(id=row.id, base_model=row.base_model, user=render.user(row.key_id))
