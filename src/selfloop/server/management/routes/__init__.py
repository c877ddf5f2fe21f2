"""Routes below ``/v1``, a file per resource. A team's twin of a route answers as the plain one, for that team."""

from fastapi import APIRouter

from selfloop.server.management.routes import (
    account,
    checkpoints,
    cluster,
    deployments,
    keys,
    models,
    observations,
    run_metrics,
    runs,
    samplers,
    timelines,
)

router = APIRouter(prefix="/v1", tags=["management"])
_PARTS = (
    runs,
    run_metrics,
    timelines,
    samplers,
    models,
    deployments,
    checkpoints,
    account,
    keys,
    observations,
    cluster,
)
for part in _PARTS:
    router.include_router(part.router)

public = checkpoints.public
public_archives = observations.public
