"""Run the gateway: uvicorn on our application, stopped in order."""

import asyncio
import logging
from collections.abc import Callable

import uvicorn

from selfloop.control.control import Control
from selfloop.server.app import make_app
from selfloop.server.settings import Settings

# How long requests in flight may go on once we are told to stop; long polls are sent home at once.
_CLOSE_GRACE_S = 5


class _Server(uvicorn.Server):
    """Tells when it listens, and sends long polls home before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, control: Control, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._control = control
        self._on_listening = on_listening

    async def startup(self, sockets: "list[object] | None" = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: "list[object] | None" = None) -> None:  # type: ignore[override]
        await self._control.operations.stop()
        await super().shutdown(sockets)  # type: ignore[arg-type]


async def run_gateway(settings: Settings, first_key: str | None, on_listening: Callable[[str | None], None]) -> None:
    """Serve until a signal. ``on_listening`` gets the key that was made at this start, if any."""
    control = Control(settings.control)
    made = await control.start(first_key)
    app = make_app(settings, control)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_CLOSE_GRACE_S,
        # Above the clients' heartbeat of 60 s, so that it does not dial anew each time.
        timeout_keep_alive=120,
    )
    server = _Server(config, control, lambda: on_listening(made))
    await server.serve()


def serve(settings: Settings, first_key: str | None, on_listening: Callable[[str | None], None]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run_gateway(settings, first_key, on_listening))
