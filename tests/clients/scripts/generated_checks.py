"""Runs in .venv-openapi: a client generated from our OpenAPI document makes a run, reads it and ends it.

Arguments: the folder that has the generated package, the server's address, a key. Prints one JSON object.
"""

import json
import sys
from importlib import import_module
from typing import Any

from openapi_spec_validator import validate

FOLDER, URL, KEY = sys.argv[1:]
sys.path.insert(0, FOLDER)
generated = import_module("generated")
models = import_module("generated.models")


def call(name: str, *path: str, **body: Any) -> Any:
    """The answer of the management route whose generated module is called so."""
    route = import_module(f"generated.api.management.{name}")
    response = route.sync_detailed(*path, client=client, **body)
    assert response.status_code == 200, response
    return response.parsed


with open(f"{FOLDER}/openapi.json") as file:
    validate(json.load(file))
# The scheme that is not the generator's own default: `Api-Key K`.
client = generated.AuthenticatedClient(base_url=URL, token=KEY, prefix="Api-Key")
session = call("create_session_v1_loops_sessions_post", body=models.CreateLoopsSessionRequestV1()).session
asked = models.CreateLoopsRunRequestV1(session_id=session.id, base_model="tiny/llama", lora_rank=4, seed=None)
run = call("create_run_v1_loops_runs_post", body=asked).run
read = call("get_run_v1_loops_runs_run_id_get", run.id).run
listed = [r.id for r in call("list_runs_v1_loops_runs_get").runs]
ended = call("deactivate_run_v1_loops_runs_run_id_deactivate_post", run.id)
teams = call("teams_v1_teams_get").teams
twin = call("create_run_v1_teams_team_id_loops_runs_post", teams[0].id, body=asked).run
said = {
    "types": [type(run).__name__, type(run.sampler).__name__, type(run.sampler.status.name).__name__],
    "is_read": read.id == run.id and read.lora_rank == 4,
    "is_listed": run.id in listed,
    "ended": ended.id == run.id,
    "ids": [run.deployment_id, run.sampler.model_id, run.sampler.deployment_id],
    "twin": twin.id,
}
print(json.dumps(said))
