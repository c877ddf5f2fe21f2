"""The gateway's application: the dialects on one control."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import selfloop
from selfloop.control.gateway import Control
from selfloop.control.observe.instruments import REGISTRY
from selfloop.server import (
    anthropic,
    api_browser,
    dashboard,
    errors,
    graphql,
    hub,
    loops,
    management,
    openai,
    openapi,
    tinker,
)
from selfloop.server.middleware.body_limit import BodyLimit
from selfloop.server.middleware.dialects import RequestDialect
from selfloop.server.middleware.guard import Guard
from selfloop.server.middleware.headers import BrowserHeaders, LocalNames, is_local
from selfloop.server.middleware.key_limits import KeyLimiter
from selfloop.server.middleware.observe import Observed
from selfloop.server.middleware.polls import Polls
from selfloop.server.shared.auth import ControlOf
from selfloop.server.shared.dialect import Dialect, Dialects, Mount
from selfloop.server.shared.query_parameters import check_plain_routes, check_query
from selfloop.server.shared.schemas import ERRORS
from selfloop.types.settings import Settings

DIALECTS = (
    management.DIALECT,
    loops.DIALECT,
    tinker.DIALECT,
    openai.DIALECT,
    anthropic.DIALECT,
    graphql.DIALECT,
    hub.DIALECT,
    dashboard.DIALECT,
    api_browser.DIALECT,
)

_own = APIRouter(tags=["operations"])


@_own.get("/healthz", summary="Whether requests are taken.")
async def healthz() -> dict[str, str]:
    return {"status": "ok", "version": selfloop.__version__}


@_own.get("/metrics", summary="Counters and gauges for Prometheus.", response_class=Response)
async def metrics(control: ControlOf) -> Response:
    """Of the whole server, without ids of runs or teams."""
    await control.observations.gauges()
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


def make_app(settings: Settings, control: Control, dialects: Sequence[Dialect] = DIALECTS) -> FastAPI:
    """The application over a control that is stopped with it, speaking ``dialects``."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await control.stop()

    app = FastAPI(
        title="Selfloop",
        version=selfloop.__version__,
        summary="Open, self-hosted training API for the Loops client",
        lifespan=lifespan,
        # Ours has no queries, in which links have their signatures, and no messages of errors.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        # Their pages run scripts of another site.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        dependencies=[Depends(check_query)],
    )
    app.state.settings = settings
    app.state.control = control
    known = Dialects(dialects, rest=_rest(settings))
    errors.install(app, known)
    openapi.install(app, known)
    _add_middleware(app, settings, control, known)
    # Routes are tried in order: first those of the busy dialects, which are those that are polled.
    for dialect in sorted(known.all, key=lambda one: not one.polls):
        for mount in dialect.routers:
            app.include_router(
                mount.router,
                prefix=mount.prefix,
                dependencies=mount.dependencies,
                include_in_schema=mount.in_schema,
            )
    check_plain_routes(app)
    return app


def _rest(settings: Settings) -> Dialect:
    """What belongs to no dialect: the server's own routes, and paths that nobody has."""
    return Dialect(
        name="server",
        bases="/healthz, /metrics",
        routers=(Mount(_own),),
        keyless=("/healthz", "/openapi.json", *(["/metrics"] if settings.metrics_public else [])),
    )


def _add_middleware(app: FastAPI, settings: Settings, control: Control, dialects: Dialects) -> None:
    """What every request passes: the last one added is the outermost."""
    app.add_middleware(Polls)
    app.add_middleware(BodyLimit, memory_bytes=settings.body_memory_bytes)
    app.add_middleware(Guard, control=control, limits=KeyLimiter(settings.key_limits))
    if is_local(settings.host):
        names = [] if settings.public_url is None else [urlsplit(settings.public_url).hostname or ""]
        app.add_middleware(LocalNames, control=control, names=names)
    app.add_middleware(Observed, control=control)
    app.add_middleware(BrowserHeaders)
    app.add_middleware(RequestDialect, dialects=dialects)
