"""Every route of the server: how it is asked, and who may. A table that the tests of access walk and the fuzz bends.

A team owns a run, a sampler, checkpoints, a deployed model, a session and archives, all with a word in their names
that stands nowhere else.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from gateway import MODEL, Run, datum, ok, words
from selfloop.server.tinker import schema

WORD = "kestrel"
NAME = f"{WORD}-weights"


@dataclass(frozen=True)
class Ask:
    """How a route is asked.

    Args:
        json: the body, with ``{id}`` where an id of the owner's stands.
        params: the query; a string is sent as it is.
        keyless: it needs no key.
        reads: a read-only key may use it.
        admin: only an admin's key may use it.
        foreign: what another team is answered when it names the owner's things; None: it names none.
        owner: what its owner's read-only key is answered, where it may use it.
    """

    json: Any = None
    params: dict[str, str] | str = field(default_factory=dict)
    content: Callable[[dict[str, str]], bytes] | None = None
    keyless: bool = False
    reads: bool = False
    admin: bool = False
    foreign: int | None = None
    owner: int = 200


HANDED_ON = {"GET /hf/{path}", "POST /hf/{path}"}
"""Routes whose requests go to a hub as they are: their parameters and fields are the hub's."""


def gone(json: Any = None, **more: Any) -> Ask:
    """A change, or work, on something of the owner's."""
    return Ask(json, foreign=404, **more)


def seen(json: Any = None, **more: Any) -> Ask:
    """A look at something of the owner's."""
    return Ask(json, foreign=404, reads=True, **more)


def own(json: Any = None, **more: Any) -> Ask:
    """A change, or work, that names nothing of anybody's."""
    return Ask(json, **more)


def listed(json: Any = None, **more: Any) -> Ask:
    """A look at what is the caller's own."""
    return Ask(json, reads=True, **more)


def _forward_backward(ids: dict[str, str]) -> bytes:
    message = schema.ForwardBackwardRequest(model_id=ids["run_id"], seq_id=1, loss_fn="cross_entropy")
    return message.SerializeToString()


PUBLIC = Ask(keyless=True)
TRAINING = {"data": [datum(words(1))], "loss_fn": "cross_entropy"}
CHAT = {"model": "{path}", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
CHAT_WITH_BASE = CHAT | {"model": MODEL}
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": words(1)}]}
SAVED = {"model_id": "{run_id}", "seq_id": 1, "path": "x"}
QUERY = {"query": "{ user { email } organization { workspace_name } teams { id name } }"}
NEW_RUN = {"session_id": "{session_id}", "base_model": MODEL, "lora_rank": 8}
NEW_SAMPLER = {"session_id": "{session_id}", "base_model": MODEL}
CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"
EXTERNAL = "/api/v1/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls"
HOURS = {"starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-02T00:00:00Z"}
SAMPLER = "/loops/samplers/{sampler_id}"
DEPLOYED = "/v1/models/{model_id}/deployments/{deployed_id}"
LOSS = {"inputs": [], "graph": {"nodes": []}, "name": "x", "session_id": "{session_id}", "custom_loss_seq_id": 5}

# By route as the OpenAPI document has it; several rows where a route is asked for several things.
ROUTES: dict[str, list[Ask]] = {
    "GET /healthz": [PUBLIC],
    "GET /openapi.json": [PUBLIC],
    "GET /": [PUBLIC],
    "GET /dashboard/{file}": [PUBLIC],
    "GET /docs": [PUBLIC],
    "GET /docs/{file}": [PUBLIC],
    "GET /metrics": [listed()],
    # A run's data plane.
    "GET /loops/runs/{run_id}/health": [gone()],
    "GET /loops/runs/{run_id}/policy_version": [seen()],
    "POST /loops/runs/{run_id}/init_trainer_server": [gone({"lora_rank": 8, "base_model": MODEL, "seq_id": 1})],
    "POST /loops/runs/{run_id}/forward": [gone(TRAINING)],
    "POST /loops/runs/{run_id}/forward_backward": [gone(TRAINING)],
    "POST /loops/runs/{run_id}/optim_step": [gone({"adam_params": {}})],
    "POST /loops/runs/{run_id}/save_state": [gone({"name": "x"})],
    "POST /loops/runs/{run_id}/save_weights_for_sampler": [gone({"name": "x"})],
    "POST /loops/runs/{run_id}/load_state": [gone({"path": "{trainer_path}"})],
    "POST /loops/runs/{run_id}/load_state_with_optimizer": [gone({"path": "{trainer_path}"})],
    "GET /loops/runs/{run_id}/operations/{operation_id}": [gone()],
    "POST /loops/runs/{run_id}/operations/{operation_id}/cancel": [gone()],
    # A sampler's.
    f"POST {SAMPLER}/sample": [gone({"prompt": [5, 6], "max_tokens": 1})],
    f"GET {SAMPLER}/operations/{{operation_id}}": [gone()],
    f"POST {SAMPLER}/operations/{{operation_id}}/cancel": [gone()],
    f"GET {SAMPLER}/trainers_policy_version": [seen()],
    f"POST {SAMPLER}/wake": [gone()],
    f"GET {SAMPLER}/health": [gone()],
    f"GET {SAMPLER}/v1/models": [seen()],
    f"GET {SAMPLER}/v1/models/{{model}}": [seen()],
    f"POST {SAMPLER}/v1/chat/completions": [gone(CHAT_WITH_BASE)],
    f"POST {SAMPLER}/v1/completions": [gone({"model": MODEL, "prompt": "hello", "max_tokens": 1})],
    f"POST {SAMPLER}/v1/responses": [gone({"model": MODEL, "input": "hello", "max_output_tokens": 1})],
    f"POST {SAMPLER}/tokenize": [gone({"prompt": "hello"})],
    f"POST {SAMPLER}/detokenize": [gone({"tokens": [5]})],
    f"GET {SAMPLER}/tokenizer_info": [seen()],
    f"POST {SAMPLER}/sync/v1/responses": [gone({"model": MODEL, "input": "hello", "max_output_tokens": 1})],
    f"GET {SAMPLER}/sync/v1/models": [seen()],
    f"GET {SAMPLER}/sync/v1/models/{{model}}": [seen()],
    f"POST {SAMPLER}/sync/v1/chat/completions": [gone(CHAT_WITH_BASE)],
    f"POST {SAMPLER}/sync/v1/completions": [gone({"model": MODEL, "prompt": "hello", "max_tokens": 1})],
    # Management.
    "POST /v1/loops/sessions": [own({})],
    "POST /v1/teams/{team_id}/loops/sessions": [gone({})],
    "GET /v1/loops/sessions/{session_id}": [seen()],
    "GET /v1/loops/runs": [listed(), listed(params={"scope": "org"}), listed(params={"run_id": "{run_id}"})],
    "GET /v1/teams/{team_id}/loops/runs": [seen()],
    "POST /v1/loops/runs": [gone(NEW_RUN)],
    "POST /v1/teams/{team_id}/loops/runs": [gone(NEW_RUN)],
    "POST /v1/loops/debug/trainers": [gone(NEW_RUN)],
    "POST /v1/teams/{team_id}/loops/debug/trainers": [gone(NEW_RUN)],
    "POST /v1/loops/trainers": [gone(NEW_RUN)],
    "POST /v1/teams/{team_id}/loops/trainers": [gone(NEW_RUN)],
    "GET /v1/loops/runs/{run_id}": [seen()],
    "GET /v1/loops/runs/{run_id}/metrics": [seen()],
    "GET /v1/loops/runs/{run_id}/timeline": [seen()],
    "GET /v1/loops/runs/{run_id}/timeline/perfetto": [seen()],
    "GET /v1/loops/runs/{run_id}/metrics/stream": [seen(params={"timeout": "0"})],
    "POST /v1/loops/runs/{run_id}/newest_sampler": [gone()],
    "POST /v1/loops/runs/{run_id}/deactivate": [gone()],
    "POST /v1/loops/runs/{run_id}/move": [gone({})],
    "GET /v1/cluster": [listed()],
    "POST /v1/cluster/drain": [own({"group": "none"}, admin=True)],
    "POST /v1/cluster/undrain": [own({"group": "none"}, admin=True)],
    "GET /v1/loops/samplers": [listed(), listed(params={"scope": "org"})],
    "GET /v1/teams/{team_id}/loops/samplers": [seen()],
    "POST /v1/loops/debug/samplers": [gone(NEW_SAMPLER)],
    "POST /v1/teams/{team_id}/loops/debug/samplers": [gone(NEW_SAMPLER)],
    "POST /v1/loops/samplers": [gone(NEW_SAMPLER)],
    "POST /v1/teams/{team_id}/loops/samplers": [gone(NEW_SAMPLER)],
    "GET /v1/loops/samplers/{sampler_id}": [seen()],
    "POST /v1/loops/samplers/{sampler_id}/deactivate": [gone()],
    "GET /v1/models": [listed()],
    "GET /v1/teams/{team_id}/models": [seen()],
    "GET /v1/models/{model_id}": [seen()],
    "GET /v1/models/{model_id}/deployments": [seen()],
    "GET /v1/models/{model_id}/deployments/{deployment_id}": [seen()],
    "POST /v1/models/{model_id}/deployments/{deployment_id}/deactivate": [gone()],
    "GET /v1/models/{model_id}/deployments/{deployment_id}/logs": [seen()],
    "POST /v1/models/{model_id}/deployments/{deployment_id}/logs": [seen({})],
    "GET /v1/loops/deployments": [listed(), listed(params={"scope": "org"})],
    "GET /v1/loops/deployments/{deployment_id}": [seen()],
    "POST /v1/loops/deployments/{deployment_id}/deactivate": [gone()],
    "GET /v1/loops/deployments/{deployment_id}/logs": [seen()],
    "POST /v1/loops/deployments/{deployment_id}/metrics": [seen({})],
    "GET /v1/loops/deployments/{deployment_id}/debug_archive/files": [
        seen(),
        # A page of an archive that exists.
        seen(params={"page_token": "{archive_id}:0"}),
    ],
    "GET /v1/loops/checkpoints": [
        seen(params={"run_id": "{run_id}"}),
        seen(params={"checkpoint_path": "{path}"}),
        listed(params={"base_model": MODEL, "scope": "org"}),
    ],
    "POST /v1/loops/checkpoints/validate": [
        seen({"checkpoint_path": "{path}"}),
        seen({"checkpoint_path": "{path}", "run_id": "{run_id}"}),
    ],
    "POST /v1/loops/checkpoints/deploy": [
        gone(
            {
                "checkpoint_ids": ["{checkpoint_id}"],
                "model_name": "x",
                "instance_type_id": "local",
                "hf_secret_name": "none",
            }
        )
    ],
    "POST /v1/loops/checkpoints/delete": [
        gone({"run_id": "{run_id}", "dry_run": True}),
        own({"base_model": MODEL, "scope": "org", "dry_run": False}),
    ],
    "DELETE /v1/loops/checkpoints/{checkpoint_id}": [gone()],
    "GET /v1/loops/checkpoints/{checkpoint_id}/files": [seen()],
    "GET /v1/loops/checkpoints/{checkpoint_id}/source": [seen()],
    "GET /v1/loops/capabilities": [listed()],
    "GET /v1/loops/user_config": [listed()],
    "PATCH /v1/loops/user_config": [own({})],
    "GET /v1/loops/usage": [
        listed(),
        listed(params={"scope": "org", "group_by": "key"}),
        seen(params={"run_id": "{run_id}"}),
    ],
    "GET /v1/teams": [listed()],
    "GET /v1/users": [listed()],
    "GET /v1/users/me": [listed()],
    "GET /v1/users/{user_id}": [seen()],
    "GET /v1/api_keys": [Ask(admin=True)],
    "POST /v1/api_keys": [Ask({"name": "x", "team_id": "{team_id}"}, admin=True)],
    "POST /v1/teams/{team_id}/api_keys": [Ask({"name": "x"}, admin=True, foreign=404)],
    "DELETE /v1/api_keys/{key}": [Ask(admin=True, foreign=404)],
    "GET /v1/instance_types": [listed()],
    "GET /v1/instance_type_prices": [listed()],
    "GET /v1/teams/{team_id}/secrets": [seen(owner=422)],
    "POST /v1/teams/{team_id}/training_projects": [gone({})],
    "GET /v1/training_projects": [listed(owner=422)],
    "POST /v1/training_projects": [own({})],
    # By signed link: without its signature nobody gets in, and no key helps.
    "GET /files/{checkpoint_id}/{name}": [
        Ask(keyless=True, params={"expires": "99999999999", "signature": "0" * 64}, foreign=401)
    ],
    "PUT /uploads/{upload_id}/{name}": [
        Ask(keyless=True, params={"expires": "99999999999", "signature": "0" * 64}, foreign=401)
    ],
    "GET /debug_archives/{archive_id}/{name}": [
        Ask(keyless=True, params={"expires": "99999999999", "signature": "0" * 64}, foreign=401)
    ],
    "POST /graphql/": [listed(QUERY)],
    # Tinker.
    "GET /api/v1/healthz": [PUBLIC],
    "POST /api/v1/client/config": [listed({})],
    "POST /api/v1/client/dynamic_config": [listed({})],
    "GET /api/v1/get_server_capabilities": [listed()],
    "POST /api/v1/create_session": [listed({})],
    "POST /api/v1/session_heartbeat": [Ask({"session_id": "{session_id}"}, reads=True, foreign=410)],
    "POST /api/v1/sessions/{session_id}/finish": [gone({"reason": {"type": "success"}})],
    "POST /api/v1/telemetry": [listed({})],
    "POST /api/v1/create_model": [gone({"session_id": "{session_id}", "model_seq_id": 7, "base_model": MODEL})],
    "POST /api/v1/get_info": [seen({"model_id": "{run_id}"})],
    "POST /api/v1/unload_model": [gone({"model_id": "{run_id}"})],
    "POST /api/v1/forward_backward": [gone(content=_forward_backward)],
    "POST /api/v1/optim_step": [gone({"model_id": "{run_id}", "seq_id": 1, "adam_params": {}})],
    "POST /api/v1/save_weights": [gone(SAVED)],
    "POST /api/v1/save_weights_for_sampler": [gone(SAVED)],
    "POST /api/v1/save_weights_external": [gone(SAVED)],
    "POST /api/v1/load_weights": [
        gone(SAVED | {"path": "{trainer_path}", "optimizer": False}),
        gone({"session_id": "{own_session}", "model_seq_id": 3, "path": "{trainer_path}", "optimizer": False}),
    ],
    "POST /api/v1/create_custom_loss": [gone(LOSS)],
    "POST /api/v1/create_sampling_session": [
        gone({"session_id": "{session_id}", "sampling_session_seq_id": 7, "base_model": MODEL}),
        gone({"session_id": "{own_session}", "sampling_session_seq_id": 7, "model_path": "{path}"}),
    ],
    "GET /api/v1/samplers/{sampling_session_id}": [seen()],
    "POST /api/v1/asample": [gone({"sampling_session_id": "{sampler_id}", "seq_id": 0, "prompt": PROMPT})],
    "POST /api/v1/join_sampling_session": [gone({"sampling_session_id": "{sampler_id}"})],
    "POST /api/v1/retrieve_future": [
        gone({"request_id": "create_model/{run_id}"}),
        gone({"request_id": "operation/{run_id}/{operation_id}"}),
        gone({"request_id": "sample/{sampler_id}/0"}),
        gone({"request_id": "create_custom_loss/{session_id}/0"}),
    ],
    "POST /api/v1/retrieve_futures": [gone({"target": {"sampling_session_id": "{sampler_id}"}, "timeout": 0})],
    "POST /api/v1/cancel_future": [gone({"request_id": "sample/{sampler_id}/0"})],
    "GET /api/v1/training_runs": [listed(), listed(params={"access_scope": "accessible"})],
    "GET /api/v1/training_runs/{run_id}": [seen(), seen(params={"access_scope": "accessible"})],
    "GET /api/v1/training_runs/{run_id}/checkpoints": [seen()],
    "GET /api/v1/checkpoints": [listed()],
    f"DELETE {CHECKPOINT}": [gone()],
    f"POST {CHECKPOINT}/publish": [gone()],
    f"DELETE {CHECKPOINT}/publish": [gone()],
    f"PUT {CHECKPOINT}/ttl": [gone({"ttl_seconds": 1})],
    f"GET {EXTERNAL}": [seen()],
    "POST /api/v1/weights_info": [seen({"tinker_path": "{path}"})],
    "POST /api/v1/copy_weights": [gone({"source_path": "{path}"})],
    "GET /api/v1/sessions": [listed(), listed(params={"access_scope": "accessible"})],
    "GET /api/v1/sessions/{session_id}": [seen(), seen(params={"access_scope": "accessible"})],
    "PUT /api/v1/sessions/{session_id}/project": [gone({"project_id": "x"})],
    "GET /api/v1/sessions/{session_id}/trace_export": [seen()],
    "POST /api/v1/sessions/search": [
        listed({"owner": {"type": "accessible"}}),
        listed({"session_id": "{session_id}", "owner": {"type": "user", "owner_urns": ["selfloop:key:{user_id}"]}}),
    ],
    "POST /api/v1/checkpoints/search": [listed({"owner": {"type": "accessible"}})],
    "POST /api/v1/external_weights_upload_start": [own({"base_model": MODEL})],
    "POST /api/v1/external_weights_upload_finish": [gone({"upload_id": "{upload_id}"})],
    "GET /api/v1/auth/apikey/me": [listed()],
    "DELETE /api/v1/auth/apikey/me": [listed(owner=204)],
    "POST /api/v1/auth/token": [listed()],
    "GET /api/v1/audit": [listed()],
    "GET /api/v1/billing/usage/events": [listed(params=HOURS)],
    "GET /api/v1/billing/usage/checkpoints/current": [listed(), listed(params={"project_id": "x"})],
    # OpenAI's and Anthropic's servers.
    "GET /oai/api/v1/models": [listed()],
    "GET /oai/api/v1/models/{model}": [seen()],
    "POST /oai/api/v1/chat/completions": [gone(CHAT)],
    "POST /oai/api/v1/completions": [gone({"model": "{path}", "prompt": "hello", "max_tokens": 1})],
    "GET /anthropic/api/v1/models": [listed()],
    "GET /anthropic/api/v1/models/{model}": [seen()],
    "POST /oai/api/v1/responses": [gone({"model": "{path}", "input": "hello", "max_output_tokens": 1})],
    "POST /oai/api/tokenize": [gone({"model": "{path}", "prompt": "hello"})],
    "POST /oai/api/detokenize": [gone({"model": "{path}", "tokens": [5]})],
    "GET /oai/api/tokenizer_info": [seen(params={"model": "{path}"})],
    "POST /anthropic/api/v1/messages": [gone(CHAT)],
    "POST /anthropic/api/v1/messages/count_tokens": [gone({k: v for k, v in CHAT.items() if k != "max_tokens"})],
    # Tokenizers.
    "GET /hf/api/models/{model_id}/tree/{revision}": [PUBLIC],
    "GET /hf/api/models/{model_id}/tree/{revision}/{folder}": [PUBLIC],
    "GET /hf/api/models/{model_id}/revision/{revision}": [PUBLIC],
    "GET /hf/api/models/{model_id}": [PUBLIC],
    "GET /hf/{model_id}/resolve/{revision}/{file}": [PUBLIC],
    "GET /hf/{path}": [PUBLIC],
    "POST /hf/{path}": [PUBLIC],
}


def filled(value: Any, ids: dict[str, str]) -> Any:
    """With each ``{id}`` replaced."""
    if isinstance(value, str):
        return re.sub(r"{(\w+)}", lambda match: ids[match[1]], value)
    if isinstance(value, dict):
        return {key: filled(inner, ids) for key, inner in value.items()}
    return [filled(inner, ids) for inner in value] if isinstance(value, list) else value


def send(http: httpx.Client, route: str, ask: Ask, ids: dict[str, str]) -> httpx.Response:
    method, path = route.split(" ")
    if path.startswith("/v1/models/{model_id}/deployments/{deployment_id}"):
        ids = ids | {"deployment_id": ids["sampler_deployment_id"]}
    json = None if ask.json is None or ask.json is QUERY else filled(ask.json, ids)
    # A string has its own encoding, which may be a wrong one.
    query = f"?{ask.params}" if isinstance(ask.params, str) else ""
    return http.request(
        method,
        filled(path, ids) + query,
        json=QUERY if ask.json is QUERY else json,
        params=None if query else filled(ask.params, ids),
        content=None if ask.content is None else ask.content(ids),
    )


def owned(http: httpx.Client, other_team: httpx.Client) -> dict[str, str]:
    """What a team has (made here, with its key), and one session of the other team's."""

    def post(route: str, **body: object) -> Any:
        return ok(http.post(f"/api/v1/{route}", json=body))

    session = post("create_session", display_name=WORD, user_metadata={WORD: WORD}, project_id=WORD)
    run = Run.create(http, session["session_id"], name=WORD).attached()
    operation = run.submit("forward_backward", data=[datum(words(1))], loss_fn="cross_entropy")
    run.result(operation)
    run.step()
    trainer_path, path = run.save(NAME), run.save(NAME, "save_weights_for_sampler")
    external = post("save_weights_external", model_id=run.id, seq_id=run.seq + 1, path=NAME)
    post("retrieve_future", request_id=external["request_id"])
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    deployed = ok(
        http.post(
            "/v1/loops/checkpoints/deploy",
            json={
                "checkpoint_ids": [checkpoint["id"]],
                "model_name": WORD,
                "instance_type_id": "local",
                "hf_secret_name": WORD,
            },
        )
    )
    archive = ok(http.get(f"/v1/loops/deployments/{run.resource['deployment_id']}/debug_archive/files"))
    me = ok(http.get("/v1/users/me"))
    (team,) = ok(http.get("/v1/teams"))["teams"]
    return {
        "run_id": run.id,
        "session_id": session["session_id"],
        "own_session": ok(other_team.post("/api/v1/create_session", json={}))["session_id"],
        "operation_id": operation,
        "sampler_id": run.resource["sampler"]["id"],
        "sampling_session_id": run.resource["sampler"]["id"],
        "deployment_id": run.resource["deployment_id"],
        "sampler_deployment_id": deployed["deployment_id"],
        "model_id": deployed["model_id"],
        "checkpoint_id": checkpoint["id"],
        "upload_id": post("external_weights_upload_start", base_model=MODEL)["upload_id"],
        "archive_id": httpx.URL(archive["presigned_urls"][0]["url"]).path.split("/")[2],
        "trainer_path": trainer_path,
        "path": path,
        "model": path,
        "kind": "sampler_weights",
        "name": NAME,
        "team_id": team["id"],
        "user_id": me["user_id"],
        "key": me["user_id"],
        "revision": "main",
        "folder": "x",
        "file": "tokenizer.json",
    }
