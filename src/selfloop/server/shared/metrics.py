"""``GET /metrics``: Prometheus text. Needs a key, as everything does, unless the server was told otherwise."""

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from selfloop.control.observe.instruments import REGISTRY
from selfloop.server.shared.auth import ControlOf

router = APIRouter(tags=["operations"])


@router.get("/metrics", summary="Counters and gauges for Prometheus.", response_class=Response)
async def metrics(control: ControlOf) -> Response:
    """Of the whole server, without ids of runs or teams."""
    await control.observations.gauges()
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
