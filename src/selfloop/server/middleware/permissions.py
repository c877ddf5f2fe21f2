"""What each role may do: the one table that every request of every dialect is held against.

An admin may do everything in its team, a member all but manage keys. A read-only key may use the routes that are named
here: it lists, downloads and watches. It takes no part in a run: no operations, samples, polls or keepalives, which
spend compute or keep capacity awake.
"""

import re
from collections.abc import Sequence

from starlette.routing import compile_path

from selfloop.types.errors import Forbidden
from selfloop.types.roles import Role

_READING = {"GET", "HEAD"}
# Below here GET is the data plane's: what is not named is a poll or a keepalive.
_DATA_PLANE = "/loops/"

_ADMIN_ONLY = (
    "* /v1/api_keys",
    "* /v1/api_keys/{key}",
    "* /v1/teams/{team_id}/api_keys",
)
# Beside every other GET.
_READ_ONLY = (
    "GET /loops/runs/{run_id}/policy_version",
    "GET /loops/samplers/{sampler_id}/trainers_policy_version",
    "GET /loops/samplers/{sampler_id}/v1/models",
    "GET /loops/samplers/{sampler_id}/v1/models/{model:path}",
    "GET /loops/samplers/{sampler_id}/tokenizer_info",
    "GET /loops/samplers/{sampler_id}/sync/v1/models",
    "GET /loops/samplers/{sampler_id}/sync/v1/models/{model:path}",
    "POST /v1/loops/checkpoints/validate",
    "POST /v1/loops/deployments/{deployment_id}/metrics",
    "POST /v1/models/{model_id}/deployments/{deployment_id}/logs",
    # Queries; its one mutation asks for a member itself.
    "POST /graphql/",
    "POST /api/v1/client/config",
    "POST /api/v1/client/dynamic_config",
    "POST /api/v1/telemetry",
    # The Tinker client opens a session of its own before it asks for anything, and says that it lives.
    "POST /api/v1/create_session",
    "POST /api/v1/session_heartbeat",
    "POST /api/v1/sessions/search",
    "POST /api/v1/checkpoints/search",
    "POST /api/v1/get_info",
    "POST /api/v1/weights_info",
    "POST /api/v1/auth/token",
    # A key that leaked is best ended by whoever finds it.
    "DELETE /api/v1/auth/apikey/me",
)


def _compiled(table: Sequence[str]) -> list[tuple[str, re.Pattern[str]]]:
    return [(method, compile_path(path)[0]) for method, _, path in (line.partition(" ") for line in table)]


_ADMIN_ROUTES, _READ_ONLY_ROUTES = _compiled(_ADMIN_ONLY), _compiled(_READ_ONLY)


def check(role: Role, method: str, path: str) -> None:
    """Raises :class:`Forbidden` unless a key of ``role`` may send such a request."""
    if role == Role.ADMIN:
        return
    if _is_in(_ADMIN_ROUTES, method, path):
        raise Forbidden(role, "an admin key of the team")
    if role == Role.READ_ONLY:
        is_listing = method in _READING and not path.startswith(_DATA_PLANE)
        if not is_listing and not _is_in(_READ_ONLY_ROUTES, method, path):
            raise Forbidden(role, "a member or admin key, as it changes something or spends compute")


def check_may_change(role: Role) -> None:
    """Raises :class:`Forbidden` for a role that may only read, where the request's body tells which it is."""
    if role == Role.READ_ONLY:
        raise Forbidden(role, "a member or admin key, as it changes something or spends compute")


def _is_in(table: Sequence[tuple[str, re.Pattern[str]]], method: str, path: str) -> bool:
    return any(known in ("*", method) and pattern.match(path) for known, pattern in table)
