"""The gateway's application: the dialects on one control."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI

import selfloop
from selfloop.control.gateway import Control
from selfloop.server import errors, openapi
from selfloop.server.anthropic.routes import router as anthropic_router
from selfloop.server.graphql import router as graphql_router
from selfloop.server.hub import RealHub
from selfloop.server.hub import router as hub_router
from selfloop.server.loops import sampler, trainer
from selfloop.server.management import routes as management
from selfloop.server.middleware.base_urls import BaseUrls
from selfloop.server.middleware.body_limit import BodyLimit
from selfloop.server.middleware.guard import Guard, KeylessPaths
from selfloop.server.middleware.headers import BrowserHeaders, LocalNames, is_local
from selfloop.server.middleware.key_limits import KeyLimits
from selfloop.server.middleware.observe import Observed
from selfloop.server.middleware.polls import Polls
from selfloop.server.openai.routes import mount as mount_openai
from selfloop.server.settings import Settings
from selfloop.server.shared.decode import json_is_text
from selfloop.server.shared.metrics import router as metrics_router
from selfloop.server.shared.query_parameters import check_plain_routes, check_query
from selfloop.server.tinker import futures
from selfloop.server.tinker.routes import router as tinker_router


@dataclass(frozen=True, slots=True)
class _CatalogueForHub:
    """The model catalogue, as the hub dialect wants to see it."""

    control: Control
    serve_weights: bool

    async def folder(self, model_id: str) -> Path | None:
        return await self.control.catalogue.folder(model_id)


def make_app(settings: Settings, control: Control) -> FastAPI:
    """The application over a control that is started and stopped with it."""

    hub = RealHub(settings.hub_url)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await hub.close()
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
        responses=openapi.ERRORS,
        dependencies=[Depends(check_query)],
    )
    app.state.settings = settings
    app.state.control = control
    errors.install(app)
    app.add_middleware(Polls, polls=(trainer.POLL, sampler.POLL, futures.POLL))
    app.add_middleware(BodyLimit, memory_bytes=settings.body_memory_bytes)
    keyless = KeylessPaths(["/metrics"] if settings.metrics_public else [])
    openapi.install(app, keyless.has, offers_serverless=settings.capacity.offers_serverless)
    app.add_middleware(Guard, control=control, limits=KeyLimits(settings.key_limits), keyless=keyless)
    if is_local(settings.host):
        names = [] if settings.public_url is None else [urlsplit(settings.public_url).hostname or ""]
        app.add_middleware(LocalNames, control=control, names=names)
    app.add_middleware(Observed, control=control)
    app.add_middleware(BrowserHeaders)
    app.add_middleware(BaseUrls)

    @app.get("/healthz", tags=["operations"], summary="Whether requests are taken.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": selfloop.__version__}

    # Routes are tried in this order: those of the busy data plane first.
    app.include_router(trainer.router)
    app.include_router(sampler.router)
    app.include_router(metrics_router)
    app.include_router(management.router, dependencies=[Depends(json_is_text)])
    app.include_router(management.public)
    app.include_router(management.public_archives)
    app.include_router(graphql_router, dependencies=[Depends(json_is_text)])
    app.include_router(tinker_router)
    mount_openai(app)
    app.include_router(anthropic_router)
    app.include_router(hub_router(_CatalogueForHub(control, settings.serve_weights), hub))
    check_plain_routes(app)
    return app
