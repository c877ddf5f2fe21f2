"""Run the gateway: uvicorn on our application, stopped in order."""

import asyncio
import gc
import logging
import math
import os
import resource
import shutil
import socket
from collections.abc import Callable

import uvicorn
import uvloop
from fastapi import FastAPI

from selfloop.control.data_dir.disk_space import OUTCOME_BYTES, SPARE_BYTES
from selfloop.control.data_dir.identity import make_folder
from selfloop.control.gateway import Control
from selfloop.server.listening import bound
from selfloop.server.middleware.connections import BoundedConnection
from selfloop.server.middleware.headers import is_local
from selfloop.server.telemetry import exporting_spans, finish, logging_to
from selfloop.types.settings import Settings

log = logging.getLogger(__name__)

# Connections that may wait to be taken, as when hundreds of samples are asked for at once.
_BACKLOG = 4096
# Thousands of waiting requests are a large heap with little garbage, and looking through it stops everything else.
# So what is new is looked through often, while it is little; everything at most each five minutes.
_COLLECT_YOUNG_EVERY_S = 0.5
_COLLECT_AFTER = (20_000, 50, 600)


class _Server(uvicorn.Server):
    """Tells when it listens, and sends long polls home before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, control: Control, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._control = control
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._control.operations.stop()
        self._control.jobs.release()
        self._control.queued_samples.send_home()
        self._control.run_metrics.stop()
        await super().shutdown(sockets)
        # Here, as the signal that ends us is raised once more before anybody above hears of it.
        await asyncio.to_thread(finish)


async def run_gateway(settings: Settings, on_listening: Callable[[str | None], None]) -> None:
    """Serve until a signal. ``on_listening`` gets the key that was made at this start, if any.

    Raises:
        SelfloopError: it cannot listen there, which is found out before anything is made; or see :meth:`Control.start`.
    """
    with bound(settings.host, settings.port) as sockets:
        await _run(settings, sockets, on_listening)


async def _run(settings: Settings, sockets: list[socket.socket], on_listening: Callable[[str | None], None]) -> None:
    control = Control(settings.data_dir, settings.control)
    made = await control.start(settings.api_key)
    # The worker is brought back meanwhile.
    app = await asyncio.to_thread(_make_app, settings, control)
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        # There is no route for them; an upgrade that is not offered is a request like any other.
        ws="none",
        log_level="warning",
        server_header=False,
        access_log=False,
        # Its own would close every handler there is.
        log_config=None,
        timeout_graceful_shutdown=math.ceil(settings.control.requests_grace_s),
        # Above the clients' heartbeat of 60 s, so that it does not dial anew each time.
        timeout_keep_alive=120,
        backlog=_BACKLOG,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )

    def listening() -> None:
        gc.freeze()
        on_listening(made)

    collecting = asyncio.create_task(_collect_young(), name="collect-garbage")
    try:
        await _Server(config, control, listening).serve(sockets)
    finally:
        collecting.cancel()


def _make_app(settings: Settings, control: Control) -> FastAPI:
    # Not with this module: half the time of a start goes by until the routes are there.
    from selfloop.server.app import make_app

    return make_app(settings, control)


def serve(settings: Settings, on_listening: Callable[[str | None], None]) -> None:
    # Whatever this process and its workers write is for its user alone.
    os.umask(0o077)
    make_folder(settings.data_dir)
    with logging_to(settings.data_dir, settings.log_format), exporting_spans():
        _warn_of_exposure(settings)
        _warn_of_full_disk(settings)
        _allow_many_connections()
        gc.set_threshold(*_COLLECT_AFTER)
        uvloop.run(run_gateway(settings, on_listening))


async def _collect_young() -> None:
    """Keep the young generations small: what arrives replaces what leaves, so that their own count hardly grows."""
    while True:
        await asyncio.sleep(_COLLECT_YOUNG_EVERY_S)
        gc.collect(1)


def _warn_of_exposure(settings: Settings) -> None:
    is_encrypted = settings.tls_cert is not None or (settings.public_url or "").startswith("https:")
    if not is_local(settings.host) and not is_encrypted:
        log.warning(
            "listening on %s without TLS: keys can be read on the way; see --tls-cert, or put a TLS proxy in front",
            settings.host,
        )
    if settings.data_dir.stat().st_mode & 0o077:
        log.warning("%s is open to other users of this machine; chmod 700 closes it", settings.data_dir)


def _warn_of_full_disk(settings: Settings) -> None:
    free = shutil.disk_usage(settings.data_dir).free
    if free < SPARE_BYTES:
        log.warning(
            "the disk of %s has only %d MiB left: saves are refused below %d MiB, and all operations below %d",
            *(settings.data_dir, free // 2**20, SPARE_BYTES // 2**20, OUTCOME_BYTES // 2**20),
        )


def _allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: every waiting client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
