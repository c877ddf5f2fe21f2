"""Worker groups: how they are, which take runs, and which group a run lives in."""

from fastapi import APIRouter

from selfloop.control.capacity.worker_groups import PlacedGroup
from selfloop.server.management.schemas.cluster import (
    ClusterV1,
    DrainRequestV1,
    MoveRunRequestV1,
    WorkerGroupAnswerV1,
    WorkerGroupV1,
)
from selfloop.server.shared.auth import CallerOf, ControlOf

router = APIRouter()


@router.get("/cluster", summary="The worker groups of every base model in use.")
async def cluster(caller: CallerOf, control: ControlOf) -> ClusterV1:
    """With ``selfloop serve --workers N`` there are N of each base model."""
    return ClusterV1(groups=[_shown(group) for group in control.lifecycle.worker_groups.all()])


@router.post("/cluster/drain", summary="Move everything out of a worker group. Admins only.")
async def drain(body: DrainRequestV1, caller: CallerOf, control: ControlOf) -> WorkerGroupAnswerV1:
    """Answers once its runs are stored and live elsewhere; a run goes on where it was."""
    return WorkerGroupAnswerV1(group=_shown(await control.lifecycle.drain(body.group)))


@router.post("/cluster/undrain", summary="Have a worker group take runs again. Admins only.")
async def undrain(body: DrainRequestV1, caller: CallerOf, control: ControlOf) -> WorkerGroupAnswerV1:
    """What was moved away stays where it is."""
    return WorkerGroupAnswerV1(group=_shown(control.lifecycle.worker_groups.undrain(body.group)))


@router.post("/loops/runs/{run_id}/move", summary="Move a run to another worker group.")
async def move_run(run_id: str, body: MoveRunRequestV1, caller: CallerOf, control: ControlOf) -> WorkerGroupAnswerV1:
    """With all that shares its deployment. The answer is the group that it lives in from now on."""
    run = (await control.runs.get(caller, run_id)).run
    return WorkerGroupAnswerV1(group=_shown(await control.lifecycle.move(run.deployment_id, body.group)))


def _shown(group: PlacedGroup) -> WorkerGroupV1:
    return WorkerGroupV1(
        name=group.name,
        base_model=group.model_name,
        state=group.state,
        reason=group.reason,
        drained=group.is_drained,
        pid=group.pid,
        num_deployments=len(group.deployments),
        num_samplers=len(group.samplers),
    )
