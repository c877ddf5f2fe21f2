"""``GET /metrics``: Prometheus text. Needs a key, as everything does, unless the server was told otherwise."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from selfloop.control.observe.instruments import REGISTRY
from selfloop.server.auth import ControlOf, authenticated

router = APIRouter(tags=["operations"])


@router.get("/metrics", summary="Counters and gauges for Prometheus.", response_class=Response)
async def metrics(request: Request, control: ControlOf) -> Response:
    """Of the whole server, without ids of runs or teams."""
    if not request.app.state.settings.metrics_public:
        await authenticated(request)
    await control.observations.gauges()
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
