"""The hub's dialect. No key is asked for: tokenizer files are public, weights only when configured."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, FastAPI

from selfloop.control.gateway import Control
from selfloop.control.resources import base_checkpoints
from selfloop.server.hub.real_hub import RealHub
from selfloop.server.hub.routes import Hub, router
from selfloop.server.shared.dialect import Dialect, Mount


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """The model catalogue, as the routes want to see it."""

    control: Control
    serve_weights: bool

    async def folder(self, model_id: str) -> Path | None:
        return await self.control.catalogue.folder(model_id)

    async def pinned(self, model_id: str, revision: str) -> Path | None:
        return await base_checkpoints.folder(self.control.catalogue, model_id, revision)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    settings = app.state.settings
    app.state.hub = Hub(_Catalogue(app.state.control, settings.serve_weights), RealHub(settings.hub_url))
    try:
        yield
    finally:
        await app.state.hub.real.close()


DIALECT = Dialect(
    name="hub",
    bases="/hf (tokenizers)",
    routers=(Mount(router), Mount(APIRouter(lifespan=_lifespan))),
    prefixes=("/hf/",),
    keyless=("/hf/",),
)
