"""The management API beside POST /v1/loops/runs: what was made is listed, shown as it is, and ended."""

import httpx
import pytest

import stores
from gateway import KEY, MODEL, Gateway, Json, Run, create_run, datum, new_session, ok, selfloop, words

UNKNOWN = "aaaaaaa"


@pytest.fixture(scope="module")
def same_team(gateway: Gateway) -> httpx.Client:
    """Another key of the first key's team."""
    return gateway.http(selfloop("keys", "create", "colleague", "--data-dir", str(gateway.data_dir)).split()[-1])


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    """A run with a trainer and a sampler checkpoint."""
    run = Run.create(http, seed=1, name="mine").attached()
    run.train(1, 2)
    run.save("a-state")
    run.save("a-sampler", "save_weights_for_sampler")
    return run


def checkpoints(http: httpx.Client, **params: str) -> list[Json]:
    return ok(http.get("/v1/loops/checkpoints", params=params))["checkpoints"]


# -- sessions, teams, capabilities --------------------------------------------------------------------


def test_session(http: httpx.Client):
    session = new_session(http)
    assert ok(http.get(f"/v1/loops/sessions/{session}")) == {"session": {"id": session}}
    assert ok(http.post("/v1/loops/sessions", json={"training_project_id": "project"}))["session"]["id"] != session
    assert http.get(f"/v1/loops/sessions/{UNKNOWN}").status_code == 404


def test_team_routes(http: httpx.Client):
    (team,) = ok(http.get("/v1/teams"))["teams"]
    assert (team["name"], team["default"]) == ("default", True)
    root = f"/v1/teams/{team['id']}/loops"
    session = ok(http.post(f"{root}/sessions"))["session"]["id"]
    body = {"session_id": session, "base_model": MODEL}
    run = ok(http.post(f"{root}/runs", json=body))["run"]
    trainer = ok(http.post(f"{root}/trainers", json=body))["run"]
    sampler = ok(http.post(f"{root}/samplers", json=body))["sampler"]
    listed = [r["id"] for r in ok(http.get(f"{root}/runs"))["runs"]]
    assert {run["id"], trainer["id"]} <= set(listed)
    assert sampler["base_model"] == MODEL


def test_each_key_sees_its_own_team(http: httpx.Client, other_team: httpx.Client):
    (own,), (other,) = (ok(client.get("/v1/teams"))["teams"] for client in (http, other_team))
    assert other["name"] == "other"
    assert own["id"] != other["id"]


def test_capabilities(http: httpx.Client):
    def names(**params: object) -> list[str]:
        answer = ok(http.get("/v1/loops/capabilities", params=params))
        return [model["model_name"] for model in answer["supported_models"]]

    assert {MODEL, "HuggingFaceTB/SmolLM2-135M-Instruct"} == set(names())
    assert names(model=MODEL, use_case="rl") == [MODEL]
    assert names(model="no/such") == []
    assert MODEL in names(max_seq_len=257)
    (long,) = ok(http.get("/v1/loops/capabilities", params={"model": MODEL, "max_seq_len": 257}))["supported_models"]
    assert (long["enabled"], long["max_enabled_seq_len"]) == (False, 256)
    assert long["enablement_details"]["reason"] == "sequence_length_unsupported"
    assert "256" in long["enablement_details"]["remediation"]
    (model,) = ok(http.get("/v1/loops/capabilities", params={"model": MODEL}))["supported_models"]
    assert model["max_seq_len"] == model["max_context_length"] == model["max_enabled_seq_len"] == 256
    assert (model["enabled"], model["supports_vision_language"]) == (True, False)


# -- runs, deployments, samplers ----------------------------------------------------------------------


def test_runs_are_listed(http: httpx.Client, same_team: httpx.Client, trained: Run):
    def ids(client: httpx.Client, **params: str) -> list[str]:
        return [run["id"] for run in ok(client.get("/v1/loops/runs", params=params))["runs"]]

    assert trained.id in ids(http)
    assert ids(http, run_id=trained.id) == [trained.id]
    assert trained.id in ids(http, base_model=MODEL)
    assert ids(http, base_model="no/such") == []
    assert ids(same_team) == []
    assert trained.id in ids(same_team, scope="org")
    assert same_team.get(f"/v1/loops/runs/{trained.id}").status_code == 200


def test_a_run_is_shown_as_it_is(http: httpx.Client, trained: Run):
    run = ok(http.get(f"/v1/loops/runs/{trained.id}"))["run"]
    assert (run["name"], run["seed"], run["lora_rank"], run["max_seq_len"]) == ("mine", 1, 8, 256)
    assert run["status"] == {"name": "ACTIVE"}
    assert run["sampler"]["run_id"] == trained.id
    assert http.get(f"/v1/loops/runs/{UNKNOWN}").status_code == 404


def test_trainer_gets_its_sampler_when_asked(http: httpx.Client):
    session = new_session(http)
    run = ok(http.post("/v1/loops/trainers", json={"session_id": session, "base_model": MODEL}))["run"]
    assert run["sampler"] is None
    body = {"session_id": session, "run_id": run["id"]}
    sampler = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
    assert ok(http.post("/v1/loops/samplers", json=body))["sampler"]["id"] == sampler["id"]
    assert ok(http.get(f"/v1/loops/runs/{run['id']}"))["run"]["sampler"]["id"] == sampler["id"]


def test_deactivated_run(http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1)
    path = run.save("kept", "save_weights_for_sampler")
    sampler = run.resource["sampler"]
    ended = ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    assert (ended["id"], ended["base_model"]) == (run.id, MODEL)
    assert "user" in ended
    assert ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))["id"] == run.id
    assert ok(http.get(f"/v1/loops/runs/{run.id}"))["run"]["status"]["name"] == "INACTIVE"
    assert ok(http.get(f"/v1/loops/samplers/{sampler['id']}"))["sampler"]["status"]["name"] == "INACTIVE"
    deployment = ok(http.get(f"/v1/loops/deployments/{run.resource['deployment_id']}"))["deployment"]
    assert (deployment["status"]["name"], deployment["active_run_id"]) == ("STOPPED", None)
    for response in (
        run.post("forward", data=[datum(words(1))], loss_fn="cross_entropy"),
        http.get(f"{run.path}/health"),
        http.post(f"/loops/samplers/{sampler['id']}/sample", json={"prompt": [3], "max_tokens": 1}),
        http.post(f"/loops/samplers/{sampler['id']}/wake"),
    ):
        assert response.status_code == 409, response.text
        assert "INACTIVE" in response.json()["detail"]
        assert response.headers["X-Baseten-Error-Source"] == "06"
    # What it saved stays, and can be sampled and trained on.
    assert "adapter_model.safetensors" in run.files(path)
    standalone = {"session_id": new_session(http), "model_path": path}
    assert ok(http.post("/v1/loops/samplers", json=standalone))["sampler"]["base_model"] == MODEL


def test_deactivated_run_ends_what_was_queued(http: httpx.Client):
    run = Run.create(http)
    run.seq = 1  # Number 1 never comes, so nothing runs.
    waiting = run.submit("optim_step")
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    outcome = run.outcome(waiting)
    assert (outcome["status"], outcome["error_class"]) == ("error", "Cancelled")
    assert "deactivated" in outcome["error"]


def test_deployment(http: httpx.Client, trained: Run):
    id = trained.resource["deployment_id"]
    deployment = ok(http.get(f"/v1/loops/deployments/{id}"))["deployment"]
    assert deployment["status"]["name"] == "RUNNING"
    assert deployment["active_run_id"] == deployment["latest_run_id"] == trained.id
    assert deployment["base_url"] == trained.resource["base_url"]
    assert deployment["sampler"]["id"] == trained.resource["sampler"]["id"]
    assert deployment["instance_type"]["memory_limit_mib"] > 0
    assert (deployment["availability_model"], deployment["node_count"]) == ("dedicated", 1)
    assert id in [d["id"] for d in ok(http.get("/v1/loops/deployments"))["deployments"]]
    assert http.get(f"/v1/loops/deployments/{UNKNOWN}").status_code == 404


def test_deactivated_deployment_ends_its_runs(http: httpx.Client):
    first = create_run(http)
    second = create_run(http, reuse_from_run_id=first["id"])
    ended = ok(http.post(f"/v1/loops/deployments/{first['deployment_id']}/deactivate"))
    assert (ended["id"], ended["base_model"], ended["user"]) == (first["deployment_id"], MODEL, first["user"])
    deployment = ok(http.get(f"/v1/loops/deployments/{first['deployment_id']}"))["deployment"]
    assert deployment["status"]["name"] == "STOPPED"
    for run in (first, second):
        assert ok(http.get(f"/v1/loops/runs/{run['id']}"))["run"]["status"]["name"] == "INACTIVE"


def test_samplers(http: httpx.Client, same_team: httpx.Client):
    body = {"session_id": new_session(http), "base_model": MODEL, "max_seq_length": 32}
    sampler = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
    assert ok(http.get(f"/v1/loops/samplers/{sampler['id']}"))["sampler"]["id"] == sampler["id"]
    readiness = f"/v1/models/{sampler['model_id']}/deployments/{sampler['deployment_id']}"
    assert ok(http.get(readiness))["status"] == "ACTIVE"

    def ids(client: httpx.Client, **params: str) -> list[str]:
        return [s["id"] for s in ok(client.get("/v1/loops/samplers", params=params))["samplers"]]

    assert sampler["id"] in ids(http)
    assert sampler["id"] not in ids(same_team)
    assert sampler["id"] in ids(same_team, scope="org")
    sample = f"/loops/samplers/{sampler['id']}/sample"
    assert len(ok(http.post(sample, json={"prompt": [3] * 30, "max_tokens": 2}))["choices"]) == 1
    assert http.post(sample, json={"prompt": [3] * 30, "max_tokens": 3}).status_code == 422
    ended = ok(http.post(f"/v1/loops/samplers/{sampler['id']}/deactivate"))
    assert (ended["id"], ended["base_model"], ended["user"]) == (sampler["id"], MODEL, sampler["user"])
    assert ok(http.get(f"/v1/loops/samplers/{sampler['id']}"))["sampler"]["status"]["name"] == "INACTIVE"
    assert ok(http.get(readiness))["status"] == "INACTIVE"


def test_sampler_of_a_checkpoint_serves_it_alone(http: httpx.Client):
    run = Run.create(http, seed=1).attached()
    run.train(1, 2)
    path = run.save("first", "save_weights_for_sampler")
    tokens = words(99)
    expected = run.logprobs(tokens)
    body = {"session_id": new_session(http), "model_path": path}
    sampler = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
    run.train(3)
    run.save("second", "save_weights_for_sampler")
    request = {"prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    answer = http.post(f"/loops/samplers/{sampler['id']}/sample", json=request)
    (choice,) = ok(answer)["choices"]
    seen = [p[str(t)]["logprob"] for p, t in zip(choice["prompt_logprobs"][1:], tokens[1:], strict=True)]
    assert seen == pytest.approx(expected, abs=1e-4)
    assert answer.headers["x-trainers-policy-version"] == "2"


def test_pinned_and_floored_weights_of_a_paired_sampler(http: httpx.Client):
    run = Run.create(http, seed=1).attached()
    sample = f"/loops/samplers/{run.resource['sampler']['id']}/sample"

    def version(**headers: str) -> str:
        answer = http.post(sample, json={"prompt": [3], "max_tokens": 1}, headers=headers)
        ok(answer)
        return answer.headers["x-trainers-policy-version"]

    assert version() == "0"
    run.train(1)
    old = run.save("old", "save_weights_for_sampler")
    assert version() == "1"
    run.train(2)
    run.save("new", "save_weights_for_sampler")
    pinned, floor = {"X-Checkpoint-Path": old}, {"X-Min-Policy-Version": "2"}
    assert (version(), version(**pinned), version(**floor), version(**pinned, **floor)) == ("2", "1", "2", "2")
    assert version(**pinned, **{"X-Min-Policy-Version": "3"}) == "1"
    assert ok(http.get(sample.removesuffix("/sample") + "/trainers_policy_version")) == {"policy_version": 2}


def test_readiness_of_unknown_ids(http: httpx.Client, trained: Run):
    sampler = trained.resource["sampler"]
    assert http.get(f"/v1/models/{UNKNOWN}/deployments/{sampler['deployment_id']}").status_code == 404
    assert http.get(f"/v1/models/{sampler['model_id']}/deployments/{UNKNOWN}").status_code == 404


# -- checkpoints --------------------------------------------------------------------------------------


def test_checkpoints_are_listed(http: httpx.Client, trained: Run):
    by_name = {c["checkpoint_id"]: c for c in checkpoints(http, run_id=trained.id)}
    assert set(by_name) == {"a-state", "a-sampler"}
    state, sampler = by_name["a-state"], by_name["a-sampler"]
    assert (state["target"], sampler["target"]) == ("trainer", "sampler")
    assert state["path"] == f"bt://loops:{trained.id}/weights/a-state"
    assert sampler["path"] == f"bt://loops:{trained.id}/sampler_weights/a-sampler"
    for checkpoint in (state, sampler):
        assert (checkpoint["run_id"], checkpoint["base_model"], checkpoint["step"]) == (trained.id, MODEL, 2)
        assert (checkpoint["checkpoint_type"], checkpoint["lora_adapter_config"]["r"]) == ("lora", 8)
        assert checkpoints(http, checkpoint_path=checkpoint["path"]) == [checkpoint]
        assert checkpoint in checkpoints(http, base_model=MODEL)
        assert ok(http.post("/v1/loops/checkpoints/validate", json={"checkpoint_path": checkpoint["path"]})) == {}
        assert ok(http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/source")) == {"source": {"kind": "s3"}}


def test_checkpoint_files(http: httpx.Client, trained: Run):
    by_name = {c["checkpoint_id"]: c for c in checkpoints(http, run_id=trained.id)}
    for name, extra in (("a-state", {"optimizer.safetensors"}), ("a-sampler", set())):
        checkpoint = by_name[name]
        route = f"/v1/loops/checkpoints/{checkpoint['id']}/files"
        listed = ok(http.get(route))
        names = {f["relative_file_name"] for f in listed["presigned_urls"]}
        assert {"adapter_config.json", "adapter_model.safetensors"} | extra <= names
        assert ("optimizer.safetensors" in names) is bool(extra)
        assert listed["next_page_token"] is None
        assert listed["total_count"] == len(names)
        assert sum(f["size_bytes"] for f in listed["presigned_urls"]) == checkpoint["size_bytes"]

        paged: list[str] = []
        token: int | None = 0
        while token is not None:
            page = ok(http.get(route, params={"page_size": 1, "page_token": token}))
            paged += [f["relative_file_name"] for f in page["presigned_urls"]]
            token = page["next_page_token"]
        assert paged == [f["relative_file_name"] for f in listed["presigned_urls"]]


def test_links_need_no_key_and_serve_ranges(http: httpx.Client, trained: Run):
    (checkpoint,) = checkpoints(http, checkpoint_path=f"bt://loops:{trained.id}/weights/a-state")
    for file in ok(http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]:
        whole = httpx.get(file["url"])
        assert whole.status_code == 200
        assert len(whole.content) == file["size_bytes"]
        part = httpx.get(file["url"], headers={"Range": "bytes=5-14"})
        assert (part.status_code, part.content) == (206, whole.content[5:15])
        rest = httpx.get(file["url"], headers={"Range": f"bytes={len(whole.content) - 3}-"})
        assert (rest.status_code, rest.content) == (206, whole.content[-3:])


def test_links_cannot_be_bent(http: httpx.Client, trained: Run):
    (checkpoint,) = checkpoints(http, checkpoint_path=f"bt://loops:{trained.id}/weights/a-state")
    files = ok(http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]
    url = next(f["url"] for f in files if f["relative_file_name"] == "adapter_config.json")
    base, _, query = url.partition("?")
    # Our own, or the bucket's.
    refusal, no_signature, prefix = (403, 403, "X-Amz-E") if stores.ON_SERVERS else (401, 422, "e")
    expires = httpx.URL(url).params[f"{prefix}xpires"]
    signed, signature = query.rsplit("=", 1)
    later = query.replace(f"xpires={expires}", f"xpires={int(expires) + 1}")
    flipped = ("0" if signature[0] != "0" else "1") + signature[1:]
    for bent in (
        f"{base}?{signed}={flipped}",
        f"{base}?{signed}={'a' if stores.ON_SERVERS else 'ä'}",
        f"{base}?{later}",
        f"{base.replace('adapter_config.json', 'optimizer.safetensors')}?{query}",
        f"{base.replace('adapter_config.json', '../../selfloop.db')}?{query}",
        f"{base.replace('adapter_config.json', '%2e%2e%2f%2e%2e%2fselfloop.db')}?{query}",
    ):
        response = httpx.get(bent)
        assert response.status_code in (refusal, 404), bent
        assert b"SQLite" not in response.content
    assert later != query
    assert httpx.get(f"{base}?{signed}={flipped}").status_code == refusal
    assert httpx.get(base).status_code == no_signature


def test_saving_a_name_again_replaces_it(http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1)
    path = run.save("latest")
    (old,) = checkpoints(http, checkpoint_path=path)
    link = ok(http.get(f"/v1/loops/checkpoints/{old['id']}/files"))["presigned_urls"][0]["url"]
    run.train(2)
    assert run.save("latest") == path
    (new,) = checkpoints(http, run_id=run.id)
    assert new["id"] != old["id"]
    assert (old["step"], new["step"]) == (1, 2)
    assert httpx.get(link).status_code == 404
    assert http.get(f"/v1/loops/checkpoints/{old['id']}/files").status_code == 404


def test_checkpoint_with_a_time_to_live(http: httpx.Client):
    run = Run.create(http).attached()
    path = run.do("save_state", name="brief", ttl_seconds=3600)["path"]
    (checkpoint,) = checkpoints(http, checkpoint_path=path)
    assert checkpoint["expires_at"] is not None


# -- other teams --------------------------------------------------------------------------------------


def test_other_teams_resources_do_not_exist(http: httpx.Client, other_team: httpx.Client, trained: Run):
    """Every route of our own OpenAPI document that names a resource in its path."""
    sampler = trained.resource["sampler"]
    (team,) = ok(http.get("/v1/teams"))["teams"]
    sample = {"prompt": [3], "max_tokens": 1}
    queued = http.post(f"{sampler['base_url']}/sample", json=sample, headers={"Prefer": "respond-async"})
    forward = trained.submit("forward", data=[datum(words(1))], loss_fn="cross_entropy")
    ids = {
        "team_id": team["id"],
        "session_id": trained.resource["session_id"],
        "run_id": trained.id,
        "sampler_id": sampler["id"],
        "checkpoint_id": checkpoints(http, run_id=trained.id)[0]["id"],
        "model_id": sampler["model_id"],
        "model": MODEL,
    }
    paths = ok(http.get("/openapi.json"))["paths"]
    seen = 0
    for path, methods in paths.items():
        if "{" not in path or path.startswith(
            ("/hf/", "/files/", "/debug_archives/", "/api/", "/oai/", "/anthropic/", "/uploads/")
        ):
            continue
        if "/api_keys" in path or "{user_id}" in path:  # Keys and their holders: the walk over every route has them.
            continue
        trainer_side = path.startswith("/v1/loops/deployments")
        deployment = trained.resource["deployment_id"] if trainer_side else sampler["deployment_id"]
        operation = ok(queued, 202)["operation_id"] if path.startswith("/loops/samplers") else forward
        url = path.format(**ids, deployment_id=deployment, operation_id=operation)
        for method in methods:
            body = {} if method == "post" else None
            response = other_team.request(method.upper(), url, json=body)
            assert response.status_code == 404, (method, path, response.text)
            if path.startswith("/loops/"):
                assert response.headers["X-Baseten-Error-Source"] == "06", path
            if method == "get" and not path.endswith("/secrets"):  # refused to everybody
                # A stream would go on for as long as the run lives.
                params = {"timeout": 0} if path.endswith("/stream") else None
                assert http.get(url, params=params).status_code == 200, path
            seen += 1
    assert seen >= 25, "the routes are there"


def test_other_teams_resources_cannot_be_named(http: httpx.Client, other_team: httpx.Client, trained: Run):
    session = new_session(other_team)
    own = Run.create(other_team, session)
    (state, weights) = (f"bt://loops:{trained.id}/{kind}" for kind in ("weights/a-state", "sampler_weights/a-sampler"))
    run = {"session_id": session, "base_model": MODEL}
    for method, path, body in (
        ("POST", "/v1/loops/runs", run | {"session_id": trained.resource["session_id"]}),
        ("POST", "/v1/loops/trainers", run | {"session_id": trained.resource["session_id"]}),
        ("POST", "/v1/loops/runs", run | {"path": state}),
        ("POST", "/v1/loops/runs", run | {"reuse_from_session_id": trained.resource["session_id"]}),
        ("POST", "/v1/loops/runs", run | {"reuse_from_run_id": trained.id}),
        ("POST", "/v1/loops/samplers", {"session_id": session, "run_id": trained.id}),
        ("POST", "/v1/loops/samplers", {"session_id": session, "model_path": weights}),
        ("POST", "/v1/loops/samplers", {"session_id": trained.resource["session_id"], "base_model": MODEL}),
        ("POST", "/v1/loops/checkpoints/validate", {"checkpoint_path": state}),
        ("GET", f"/v1/loops/checkpoints?run_id={trained.id}", None),
        ("GET", f"/v1/loops/checkpoints?checkpoint_path={state}", None),
        ("POST", f"{own.path}/load_state", {"path": state}),
        ("POST", f"{own.path}/load_state_with_optimizer", {"path": state}),
    ):
        response = other_team.request(method, path, json=body)
        assert response.status_code == 404, (path, body, response.text)
    pinned = {"X-Checkpoint-Path": weights}
    sample = f"/loops/samplers/{own.resource['sampler']['id']}/sample"
    response = other_team.post(sample, json={"prompt": [3], "max_tokens": 1}, headers=pinned)
    assert response.status_code == 404
    assert response.headers["X-Baseten-Error-Source"] == "06"

    for path in ("/v1/loops/runs", "/v1/loops/samplers", "/v1/loops/deployments"):
        (listed,) = ok(other_team.get(path, params={"scope": "org"})).values()
        assert trained.id not in str(listed)
    assert trained.id not in str(checkpoints(other_team, base_model=MODEL))


def test_key_revoked_while_the_server_runs(gateway: Gateway):
    data_dir = ("--data-dir", str(gateway.data_dir))
    client = gateway.http(selfloop("keys", "create", "short-lived", *data_dir).split()[-1])
    assert client.get("/v1/teams").status_code == 200
    shown = selfloop("keys", "list", *data_dir)
    (key_id,) = {line.split()[0] for line in shown.splitlines() if "short-lived" in line}
    selfloop("keys", "revoke", key_id, *data_dir)
    assert client.get("/v1/teams").status_code == 401
    assert gateway.http(KEY).get("/v1/teams").status_code == 200
