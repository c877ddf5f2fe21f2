"""The management API."""

from typing import Any

from fastapi import Depends, FastAPI

from selfloop.server.management import routes
from selfloop.server.shared.decode import json_is_text
from selfloop.server.shared.dialect import Dialect, Mount

# Null for serverless capacity. A server that offers none answers as the create-run specification has it.
_CAPACITY_IDS = {
    "LoopsRunV1": ("deployment_id",),
    "LoopsTrainerRunV1": ("deployment_id",),
    "LoopsSamplerV1": ("model_id", "deployment_id"),
}


def _name_capacity(document: dict[str, Any], app: FastAPI) -> None:
    if app.state.settings.control.capacity.offers_serverless:
        return
    for name, fields in _CAPACITY_IDS.items():
        for field in fields:
            schema: dict[str, Any] = document["components"]["schemas"][name]["properties"][field]
            del schema["anyOf"]
            schema["type"] = "string"


DIALECT = Dialect(
    name="management",
    bases="/v1/loops and /v1 (management)",
    routers=(
        Mount(routes.router, dependencies=(Depends(json_is_text),)),
        Mount(routes.public),
        Mount(routes.public_archives),
    ),
    prefixes=("/v1/", "/files/", "/debug_archives/"),
    # Files by signed link.
    keyless=("/files/", "/debug_archives/"),
    read_only=(
        "POST /v1/loops/checkpoints/validate",
        "POST /v1/loops/deployments/{deployment_id}/metrics",
        "POST /v1/models/{model_id}/deployments/{deployment_id}/logs",
    ),
    admin_only=(
        "* /v1/api_keys",
        "* /v1/api_keys/{key}",
        "* /v1/teams/{team_id}/api_keys",
        "* /v1/cluster/drain",
        "* /v1/cluster/undrain",
    ),
    amend=_name_capacity,
)
