"""Training jobs: containers that the hosted service runs for ``truss loops exec``. Refused here, with what to do."""

from fastapi import APIRouter

from selfloop.server.management.access import MemberOf
from selfloop.types.errors import BadRequest

router = APIRouter()


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
