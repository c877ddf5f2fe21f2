"""Tinker's dialect."""

from selfloop.server.shared.dialect import Dialect, Mount, Poll
from selfloop.server.tinker import futures, wire
from selfloop.server.tinker.errors import ERRORS
from selfloop.server.tinker.resources import account, checkpoints, runs, search, service, sessions, uploads
from selfloop.server.tinker.sampling import routes as sampling
from selfloop.server.tinker.training import custom_losses
from selfloop.server.tinker.training import routes as training

DIALECT = Dialect(
    name="tinker",
    bases="/api/v1 (Tinker)",
    routers=tuple(
        Mount(router)
        for router in (
            uploads.public,
            service.router,
            training.router,
            training.operations,
            custom_losses.router,
            sampling.router,
            futures.router,
            runs.router,
            checkpoints.router,
            uploads.router,
            sessions.router,
            search.router,
            account.router,
        )
    ),
    prefixes=("/api/v1/", "/uploads/"),
    errors=ERRORS,
    polls=(futures.POLL, Poll("POST", "/api/v1/retrieve_futures")),
    # The second: files by signed link.
    keyless=("/api/v1/healthz", "/uploads/"),
    read_only=(
        "POST /api/v1/client/config",
        "POST /api/v1/client/dynamic_config",
        "POST /api/v1/telemetry",
        # The client opens a session of its own before it asks for anything, and says that it lives.
        "POST /api/v1/create_session",
        "POST /api/v1/session_heartbeat",
        "POST /api/v1/sessions/search",
        "POST /api/v1/checkpoints/search",
        "POST /api/v1/get_info",
        "POST /api/v1/weights_info",
        "POST /api/v1/auth/token",
        # A key that leaked is best ended by whoever finds it.
        "DELETE /api/v1/auth/apikey/me",
    ),
    schemas=wire.SCHEMAS,
)
