"""The management half of the Tinker dialect, on the wire: listings, sharing between teams, files, audit and usage."""

import hashlib
import time
from datetime import UTC, datetime, timedelta

import httpx
import jwt
import pyrage
import pytest
from test_tinker import Wire

from gateway import KEY, MODEL, Gateway, Json, Run, create_run, new_session, ok, selfloop, words


class Rest(Wire):
    """And the management routes, called as the SDK calls them."""

    def get(self, route: str, status: int = 200, **params: object) -> Json:
        return ok(self.http.get(route, params={k: str(v) for k, v in params.items()}), status)

    def trained(self, steps: int = 1, **fields: object) -> str:
        session = self.post("/api/v1/create_session", tags=[], **fields)["session_id"]
        model = self.model(session)
        for step in range(steps):
            self.loss(model, 2 * step + 1, 1)
            self.result(self.step(model, 2 * step + 2))
        return model

    def save(self, model: str, seq: int, name: str, kind: str = "save_weights", **fields: object) -> Json:
        return self.result(self.post(f"/api/v1/{kind}", model_id=model, seq_id=seq, path=name, **fields))


def at(path: str) -> str:
    """The route of a checkpoint."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"


def ttl_of(path: str) -> str:
    """The route of a checkpoint's time to live."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/ttl"


@pytest.fixture(scope="module")
def rest(gateway: Gateway) -> Rest:
    return Rest(gateway)


@pytest.fixture(scope="module")
def stranger(gateway: Gateway, other_team: httpx.Client) -> Rest:
    return Rest(gateway, other_team.headers["Authorization"].removeprefix("Bearer "))


def teammate(gateway: Gateway) -> Rest:
    made = selfloop("keys", "create", "colleague", "--data-dir", str(gateway.data_dir))
    return Rest(gateway, made.split()[-1])


def test_a_run_and_its_checkpoints(rest: Rest):
    session = rest.session()
    model = rest.post(
        "/api/v1/create_model",
        session_id=session,
        model_seq_id=0,
        base_model=MODEL,
        lora_config={"rank": 4},
        user_metadata={"renderer_name": "x", "steps": 3},
    )["model_id"]
    first = rest.get(f"/api/v1/training_runs/{model}")
    assert first["user_metadata"] == {"renderer_name": "x", "steps": "3"}
    assert (first["base_model"], first["lora_rank"], first["is_lora"]) == (MODEL, 4, True)
    assert first["last_checkpoint"] is None
    path = rest.save(model, 1, "half", ttl_seconds=7200, user_metadata={"step": "1"})["path"]
    sampler = rest.save(model, 2, "sampled", "save_weights_for_sampler")["path"]
    run = rest.get(f"/api/v1/training_runs/{model}")
    assert run["last_request_time"] > first["last_request_time"]
    saved = run["last_checkpoint"]
    assert saved["tinker_path"] == path
    assert (saved["checkpoint_id"], saved["checkpoint_type"], saved["public"]) == ("weights/half", "training", False)
    assert saved["user_metadata"] == {"step": "1"}
    assert saved["size_bytes"] > 1000
    lives = datetime.fromisoformat(saved["expires_at"]) - datetime.fromisoformat(saved["time"])
    assert lives == timedelta(hours=2)
    assert run["last_sampler_checkpoint"]["tinker_path"] == sampler
    listed = rest.get(f"/api/v1/training_runs/{model}/checkpoints")
    assert [c["tinker_path"] for c in listed["checkpoints"]] == [sampler, path]
    everywhere = rest.get("/api/v1/checkpoints", limit=2)
    assert [c["tinker_path"] for c in everywhere["checkpoints"]] == [sampler, path]
    assert everywhere["cursor"]["total_count"] >= 2


def test_pages_of_runs(rest: Rest):
    ours = [rest.model(rest.session()) for _ in range(3)][::-1]
    first = rest.get("/api/v1/training_runs", limit=2)
    assert [run["training_run_id"] for run in first["training_runs"]] == ours[:2]
    assert (first["cursor"]["offset"], first["cursor"]["limit"]) == (0, 2)
    second = rest.get("/api/v1/training_runs", limit=2, offset=2)
    assert second["training_runs"][0]["training_run_id"] == ours[2]
    assert second["cursor"]["total_count"] == first["cursor"]["total_count"] >= 3
    for wrong in ({"limit": 0}, {"limit": 10**6}, {"offset": -1}, {"access_scope": "all"}):
        assert next(iter(wrong)) in str(rest.get("/api/v1/training_runs", 422, **wrong))
    for route in ("checkpoints", "sessions"):
        assert "limit" in str(rest.get(f"/api/v1/{route}", 422, limit=0))


def test_runs_of_loops_are_there_too(rest: Rest, http: httpx.Client):
    run = Run(http, create_run(http, new_session(http), lora_rank=4)).attached()
    saved = run.save("theirs").replace("bt://loops:", "tinker://")
    shown = rest.get(f"/api/v1/training_runs/{run.id}")
    assert (shown["training_run_id"], shown["last_checkpoint"]["tinker_path"]) == (run.id, saved)
    assert rest.post("/api/v1/weights_info", tinker_path=saved) == {
        "base_model": MODEL,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": 4,
        "train_unembed": False,
        "train_mlp": True,
        "train_attn": True,
    }
    assert rest.http.delete(at(saved)).status_code == 204
    assert rest.post("/api/v1/weights_info", 404, tinker_path=saved)["detail"].count(saved) == 1


def test_time_to_live(rest: Rest):
    model = rest.model(rest.session())
    path = rest.save(model, 1, "x", ttl_seconds=3600)["path"]

    def expiry() -> str | None:
        return rest.get(f"/api/v1/training_runs/{model}/checkpoints")["checkpoints"][0]["expires_at"]

    assert rest.http.put(ttl_of(path), json={"ttl_seconds": None}).status_code == 204
    assert expiry() is None
    assert rest.http.put(ttl_of(path), json={"ttl_seconds": 7200}).status_code == 204
    left = datetime.fromisoformat(str(expiry())) - datetime.now(UTC)
    assert timedelta(minutes=115) < left <= timedelta(hours=2)
    for wrong in ({}, {"ttl_seconds": 0}, {"ttl_seconds": "x"}):
        refused = rest.http.put(ttl_of(path), json=wrong)
        assert refused.status_code == 400
        assert "ttl_seconds" in refused.json()["detail"]
    rest.http.put(ttl_of(path), json={"ttl_seconds": 1})
    deadline = time.monotonic() + 20
    while rest.get(f"/api/v1/training_runs/{model}/checkpoints")["checkpoints"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert rest.http.put(ttl_of(path), json={"ttl_seconds": None}).status_code == 404


def test_publishing(rest: Rest, stranger: Rest):
    """Before, only the team; meanwhile everybody may read, nobody else may change; afterwards as before."""
    model = rest.trained()
    path = rest.save(model, 3, "shown", user_metadata={"about": "it"})["path"]
    hidden = rest.save(model, 4, "hidden")["path"]
    session = stranger.session()

    def reads(number: int) -> list[int]:
        load = {"session_id": session, "model_seq_id": number, "path": path, "optimizer": True}
        sample = {"session_id": session, "sampling_session_seq_id": number, "model_path": path}
        sent = (
            ("load_weights", load),
            ("create_sampling_session", sample),
            ("weights_info", {"tinker_path": path}),
            ("copy_weights", {"source_path": path}),
        )
        answers = [stranger.http.post(f"/api/v1/{route}", json=body) for route, body in sent]
        answers.append(stranger.http.get(f"/api/v1/training_runs/{model}", params={"access_scope": "accessible"}))
        answers.append(stranger.http.get(f"/api/v1/training_runs/{model}/checkpoints"))
        return [answer.status_code for answer in answers]

    assert reads(0) == [404] * 6
    for method, route in (("POST", "/publish"), ("DELETE", "/publish"), ("DELETE", "")):
        assert stranger.http.request(method, at(path) + route).status_code == 404
    assert stranger.http.put(ttl_of(path), json={"ttl_seconds": None}).status_code == 404
    for _ in range(2):
        assert rest.http.post(f"{at(path)}/publish").status_code == 204
    assert reads(1) == [200] * 6
    assert stranger.get(f"/api/v1/training_runs/{model}", 404)
    seen = stranger.get(f"/api/v1/training_runs/{model}", access_scope="accessible")
    assert seen["last_checkpoint"]["tinker_path"] == path
    assert seen["user_metadata"] is None
    assert model in [
        r["training_run_id"]
        for r in stranger.get("/api/v1/training_runs", access_scope="accessible", limit=1000)["training_runs"]
    ]
    assert model not in str(stranger.get("/api/v1/training_runs", limit=1000))
    assert hidden not in str(stranger.get(f"/api/v1/training_runs/{model}/checkpoints"))
    assert stranger.post("/api/v1/weights_info", 404, tinker_path=hidden)
    for method, route in (("POST", "/publish"), ("DELETE", "/publish"), ("DELETE", "")):
        assert stranger.http.request(method, at(path) + route).status_code == 404
    loaded = f"{session}:train:1"
    expected = rest.loss_sum(rest.loss(model, 5, 99, forward_only=True))
    assert stranger.loss_sum(stranger.loss(loaded, 1, 99, forward_only=True)) == pytest.approx(expected, rel=1e-6)
    sampler = f"{session}:sample:1"
    info = stranger.get(f"/api/v1/samplers/{sampler}")
    assert info == {"sampler_id": sampler, "base_model": MODEL, "model_path": path}
    assert rest.http.delete(f"{at(path)}/publish").status_code == 204
    assert reads(2) == [404] * 6
    assert len(stranger.tokens(ok(stranger.sample(sampler, 0)))) == 2
    assert rest.http.delete(at(path)).status_code == 204
    assert stranger.get(f"/api/v1/samplers/{sampler}") == info


def test_a_key_of_the_owner_opens_its_checkpoints(rest: Rest, stranger: Rest, gateway: Gateway):
    model = rest.trained()
    path = rest.save(model, 3, "lent")["path"]
    token = rest.http.headers["X-API-Key"]
    body = {"session_id": stranger.session(), "model_seq_id": 0, "path": path, "optimizer": False}
    refused = stranger.post("/api/v1/load_weights", 400, **body, weights_access_token="tml-nobody")
    assert "weights_access_token" in refused["detail"]
    assert "nobody" not in str(refused)
    stranger.post("/api/v1/load_weights", 404, **body)
    made = stranger.result(stranger.post("/api/v1/load_weights", **body, weights_access_token=token))
    expected = rest.loss_sum(rest.loss(model, 4, 99, forward_only=True))
    fresh = stranger.model(stranger.session())
    in_place = {"model_id": fresh, "seq_id": 1, "path": path, "optimizer": True, "weights_access_token": token}
    stranger.result(stranger.post("/api/v1/load_weights", **in_place))
    for loaded, seq in ((made["model_id"], 1), (fresh, 2)):
        assert stranger.loss_sum(stranger.loss(loaded, seq, 99, forward_only=True)) == pytest.approx(expected, rel=1e-6)
    without = {name: value for name, value in in_place.items() if name != "weights_access_token"}
    failed = ok(stranger.poll(stranger.post("/api/v1/load_weights", **without | {"seq_id": 3})))
    assert failed["category"] == "user"
    assert path in failed["error"]
    headers = {"X-Tinker-Weights-Access-Token": token}
    copied = ok(stranger.http.post("/api/v1/copy_weights", json={"source_path": path}, headers=headers))["tinker_path"]
    assert stranger.post("/api/v1/weights_info", tinker_path=copied)["lora_rank"] == 4
    rest.post("/api/v1/weights_info", 404, tinker_path=copied)


def test_copies(rest: Rest):
    model = rest.trained()
    path = rest.save(model, 3, "origin", user_metadata={"a": "b"})["path"]
    body = {"source_path": path, "destination_project_id": "of-copies", "ttl_seconds": 7200}
    headers = {"X-Idempotency-Key": "the-same"}
    first = ok(rest.http.post("/api/v1/copy_weights", json=body, headers=headers))
    assert ok(rest.http.post("/api/v1/copy_weights", json=body, headers=headers)) == first
    other = rest.save(model, 4, "another")["path"]
    refused = rest.http.post("/api/v1/copy_weights", json={"source_path": other}, headers=headers)
    assert refused.status_code == 400
    assert "Idempotency" in refused.json()["detail"]
    copy = first["tinker_path"]
    run, kind, name = copy.removeprefix("tinker://").split("/")
    assert (kind, name) == ("weights", "origin")
    assert run != model
    listed = rest.get("/api/v1/training_runs", project_id="of-copies")["training_runs"]
    assert [each["training_run_id"] for each in listed] == [run]
    assert listed[0]["last_checkpoint"]["user_metadata"] == {"a": "b"}
    assert listed[0]["last_checkpoint"]["expires_at"] is not None
    assert rest.http.delete(at(path)).status_code == 204
    expected = rest.loss_sum(rest.loss(model, 5, 99, forward_only=True))
    load = {"session_id": rest.session(), "model_seq_id": 0, "path": copy, "optimizer": True}
    loaded = rest.result(rest.post("/api/v1/load_weights", **load))["model_id"]
    assert rest.loss_sum(rest.loss(loaded, 1, 99, forward_only=True)) == pytest.approx(expected, rel=1e-6)
    step = rest.http.post("/api/v1/optim_step", json={"model_id": run, "seq_id": 1, "adam_params": {}})
    assert step.status_code == 400
    assert "INACTIVE" in step.json()["detail"]
    session = rest.session()
    placed = {"source_path": copy, "session_id": session, "model_seq_id": 7}
    assert rest.post("/api/v1/copy_weights", **placed)["tinker_path"] == f"tinker://{session}:train:7/weights/origin"
    assert rest.post("/api/v1/copy_weights", **placed)["tinker_path"] == f"tinker://{session}:train:7/weights/origin"
    assert "session_id" in rest.post("/api/v1/copy_weights", 400, source_path=copy, session_id=session)["detail"]
    both = rest.post("/api/v1/copy_weights", 400, **placed, destination_project_id="x")
    assert "destination_project_id" in both["detail"]


def test_external_weights(rest: Rest, stranger: Rest):
    """Files for others: links without a key that serve ranges; encrypted if asked; not to be loaded here."""
    model = rest.trained()
    saved = rest.save(model, 3, "out", "save_weights_external", ttl_seconds=3600)
    path = saved["path"]
    assert path == f"tinker://{model}/external_weights/out"
    found = rest.get(f"/api/v1/training_runs/{model}/checkpoints/external_weights/out/external_weights_urls")
    assert set(found["urls"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert timedelta(minutes=50) < datetime.fromisoformat(found["expires"]) - datetime.now(UTC) <= timedelta(hours=1)
    files = {name: httpx.get(url) for name, url in found["urls"].items()}
    assert all(answer.status_code == 200 for answer in files.values())
    assert sum(len(answer.content) for answer in files.values()) == saved["size_bytes"]
    assert files["adapter_config.json"].json()["base_model_name_or_path"] == MODEL
    url = found["urls"]["adapter_model.safetensors"]
    part = httpx.get(url, headers={"Range": "bytes=8-15"})
    assert part.status_code == 206
    assert part.content == files["adapter_model.safetensors"].content[8:16]
    # The server's own links, or those of the store.
    forged = url.replace("signature=", "signature=0").replace("Signature=", "Signature=0")
    assert httpx.get(forged).status_code in (401, 403)
    listed = rest.get(f"/api/v1/training_runs/{model}/checkpoints")["checkpoints"]
    assert [(c["checkpoint_type"], c["checkpoint_id"]) for c in listed] == [("external", "external_weights/out")]
    body = {"session_id": rest.session(), "model_seq_id": 0, "path": path, "optimizer": False}
    assert "path" in rest.post("/api/v1/load_weights", 400, **body)["detail"]
    stranger.get(f"/api/v1/training_runs/{model}/checkpoints/external_weights/out/external_weights_urls", 404)
    identity = pyrage.x25519.Identity.generate()
    recipients = [str(identity.to_public())]
    rest.save(model, 4, "out", "save_weights_external", age_encryption_recipients=recipients)
    urls = rest.get(f"/api/v1/training_runs/{model}/checkpoints/external_weights/out/external_weights_urls")["urls"]
    assert set(urls) == {"adapter_config.json.age", "adapter_model.safetensors.age"}
    sealed = httpx.get(urls["adapter_model.safetensors.age"]).content
    assert sealed.startswith(b"age-encryption.org/v1")
    assert pyrage.decrypt(sealed, [identity]) == files["adapter_model.safetensors"].content
    assert httpx.get(url).status_code == 404
    for seq, wrong in ((5, ["age1nonsense"]), (6, []), (7, ["x"] * 30)):
        future = rest.post(
            "/api/v1/save_weights_external", model_id=model, seq_id=seq, path="y", age_encryption_recipients=wrong
        )
        failure = ok(rest.poll(future))
        assert failure["category"] == "user"
        assert "age_encryption_recipients" in failure["error"]
    assert rest.http.delete(at(path)).status_code == 204
    assert rest.get(f"/api/v1/training_runs/{model}/checkpoints")["checkpoints"] == []


def test_loops_lists_no_external_weights(rest: Rest, http: httpx.Client):
    model = rest.model(rest.session())
    rest.save(model, 1, "out", "save_weights_external")
    run = model.replace(":train:", "t")
    assert ok(http.get("/v1/loops/checkpoints", params={"run_id": run}))["checkpoints"] == []
    url = next(
        iter(
            rest.get(f"/api/v1/training_runs/{model}/checkpoints/external_weights/out/external_weights_urls")[
                "urls"
            ].values()
        )
    )
    id = httpx.URL(url).path.split("/")[-2]
    assert http.delete(f"/v1/loops/checkpoints/{id}").status_code == 404


def test_what_names_no_checkpoint(rest: Rest):
    model = rest.model(rest.session())
    base = f"/api/v1/training_runs/{model}/checkpoints"
    assert rest.http.delete(f"{base}/nonsense/x").status_code == 400
    assert rest.http.delete(f"{base}/weights/x").status_code == 404
    assert rest.http.delete(f"{base}/weights/..x").status_code == 404
    assert rest.http.post(f"{base}/weights/x/publish").status_code == 404
    assert rest.http.get("/api/v1/training_runs/nobody").status_code == 404
    assert rest.http.get("/api/v1/training_runs/aaaaaaa/checkpoints").status_code == 404
    for field, route in (("tinker_path", "weights_info"), ("source_path", "copy_weights")):
        assert field in rest.post(f"/api/v1/{route}", 400, **{field: "tinker://x"})["detail"]
        assert rest.post(f"/api/v1/{route}", 404, **{field: "tinker://aaaaaaa/weights/x"})


def test_sessions(rest: Rest, stranger: Rest, gateway: Gateway):
    project = f"p{time.time_ns()}"
    made = {"tags": ["t"], "user_metadata": {"a": "1", "b": "2"}, "display_name": project}
    session = rest.post("/api/v1/create_session", **made)["session_id"]
    model = rest.model(session)
    sampler = rest.post(
        "/api/v1/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )["sampling_session_id"]
    assert rest.get(f"/api/v1/sessions/{session}") == {
        "training_run_ids": [model],
        "sampler_ids": [sampler],
        "user_metadata": {"a": "1", "b": "2"},
        "display_name": project,
    }
    assert rest.get("/api/v1/sessions", limit=1)["sessions"] == [session]
    assert session in rest.get("/api/v1/sessions", limit=1000, access_scope="accessible")["sessions"]
    for key, scope in ((teammate(gateway), "accessible"), (rest, "owned")):
        assert session in key.get("/api/v1/sessions", limit=1000, access_scope=scope)["sessions"]
    assert session not in teammate(gateway).get("/api/v1/sessions", limit=1000)["sessions"]
    assert session not in str(stranger.get("/api/v1/sessions", limit=1000, access_scope="accessible"))
    stranger.get(f"/api/v1/sessions/{session}", 404, access_scope="accessible")
    stranger.get(f"/api/v1/sessions/{session}/trace_export", 404)
    move = {"project_id": project}
    assert stranger.http.put(f"/api/v1/sessions/{session}/project", json=move).status_code == 404
    assert rest.http.put(f"/api/v1/sessions/{session}/project", json=move).status_code == 204
    assert rest.http.put(f"/api/v1/sessions/{session}/project", json={"project_id": ""}).status_code == 400
    assert [r["training_run_id"] for r in rest.get("/api/v1/training_runs", project_id=project)["training_runs"]] == [
        model
    ]


def test_search(rest: Rest, stranger: Rest, gateway: Gateway):
    name = f"n{time.time_ns()}"
    ids = [
        rest.post("/api/v1/create_session", tags=[], display_name=name, user_metadata={"k": str(i)}, project_id="q")[
            "session_id"
        ]
        for i in range(3)
    ][::-1]
    model = rest.model(ids[0])
    rest.save(model, 1, "x")
    rest.post(f"/api/v1/sessions/{ids[1]}/finish", reason={"type": "errored"})

    def found(by: Rest = rest, **request: object) -> list[str]:
        return [s["session_id"] for s in by.post("/api/v1/sessions/search", **request)["sessions"]]

    page = rest.post("/api/v1/sessions/search", display_name=name, limit=2)
    assert [s["session_id"] for s in page["sessions"]] == ids[:2]
    newest, ended = page["sessions"]
    assert newest["checkpoints_count"] == 1
    assert newest["checkpoint_storage_bytes"] > 1000
    assert (newest["display_name"], newest["project_id"], newest["status"]) == (name, "q", {"type": "active"})
    assert ended["status"] == {"type": "client_finished", "reason": {"type": "errored"}}
    assert found(display_name=name, limit=2, cursor=page["next_cursor"]) == ids[2:]
    assert rest.post("/api/v1/sessions/search", display_name=name)["next_cursor"] is None
    assert found(display_name=name, user_metadata={"k": "1"}) == [ids[1]]
    assert found(display_name=name, user_metadata={"k": "1", "other": "1"}) == []
    assert found(display_name="no such", session_id=ids[2]) == ids[2:]
    assert found(display_name=name, project_ids=["other"]) == []
    assert found(display_name=name, project_ids=["other", "q"]) == ids
    assert found(display_name=name, statuses=[{"type": "client_finished", "reasons": ["errored"]}]) == [ids[1]]
    assert found(display_name=name, statuses=[{"type": "client_finished", "reasons": ["success"]}]) == []
    assert found(display_name=name, statuses=[{"type": "active"}, {"type": "failed"}]) == [ids[0], ids[2]]
    colleague = teammate(gateway)
    assert found(colleague, display_name=name) == []
    assert found(colleague, display_name=name, owner={"type": "accessible"}) == ids
    assert found(colleague, display_name=name, owner={"type": "user", "owner_urns": [newest["owner"]]}) == ids
    assert found(stranger, display_name=name, owner={"type": "accessible"}) == []
    assert found(stranger, display_name=name, owner={"type": "user", "owner_urns": [newest["owner"]]}) == []
    for wrong, field in (
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"owner": {"type": "user", "owner_urns": ["x"]}}, "owner_urns"),
        ({"owner": {"type": "user", "owner_urns": []}}, "owner_urns"),
        ({"owner": {"type": "nobody"}}, "owner"),
        ({"statuses": [{"type": "x"}]}, "statuses"),
        ({"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "a"}}, "last_created_at"),
        ({"nonsense": 1}, "nonsense"),
    ):
        assert field in rest.post("/api/v1/sessions/search", 400, **wrong)["detail"]


def test_trace_export(rest: Rest):
    model = rest.trained()
    session = model.split(":")[0]
    answer = rest.get(f"/api/v1/sessions/{session}/trace_export")
    assert answer["status"] == "ready"
    trace = httpx.get(answer["url"]).json()
    events = [e for e in trace["traceEvents"] if e["ph"] == "b"]
    assert {"forward_backward", "optim_step"} <= {event["name"] for event in events}
    opened = sorted((e["id"], e["name"]) for e in trace["traceEvents"] if e["ph"] == "b")
    assert opened == sorted((e["id"], e["name"]) for e in trace["traceEvents"] if e["ph"] == "e")
    assert model.replace(":train:", "t") in [e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"]
    assert httpx.get(answer["url"].replace("signature=", "signature=0")).status_code == 401
    empty = rest.get(f"/api/v1/sessions/{rest.session()}/trace_export")
    assert httpx.get(empty["url"]).json()["traceEvents"] == []


def test_audit(rest: Rest, stranger: Rest, gateway: Gateway):
    session = rest.session()
    model = rest.model(session)
    path = rest.save(model, 1, "seen")["path"]
    rest.http.post(f"{at(path)}/publish")
    rest.http.put(ttl_of(path), json={"ttl_seconds": 7200})
    rest.http.delete(f"{at(path)}/publish")
    copy = rest.post("/api/v1/copy_weights", source_path=path)["tinker_path"]
    rest.http.delete(at(path))
    rest.http.put(f"/api/v1/sessions/{session}/project", json={"project_id": "audited"})
    mine = [
        e for e in rest.get("/api/v1/audit", event_type="checkpoints")["entries"] if e["tinker_path"] in (path, copy)
    ]
    assert [e["event"].removeprefix("checkpoint.") for e in mine] == [
        "saved", "published", "ttl_set", "unpublished", "copied", "deleted",
    ]  # fmt: skip
    assert mine[0]["model_id"] == model
    assert mine[2]["event_details"]["ttl_seconds"] == "7200"
    assert mine[4]["event_details"]["source"] == path
    assert {e["event_details"]["by"] for e in mine} == {"environment"}
    (moved,) = [
        e
        for e in rest.get("/api/v1/audit", event_type="projects")["entries"]
        if e["event_details"]["session_id"] == session
    ]
    assert moved["event_details"]["project_id"] == "audited"
    teammate(gateway)
    keys = rest.get("/api/v1/audit", event_type="organizations")["entries"]
    assert keys[-1]["event"] == "key.created"
    assert keys[-1]["event_details"]["name"] == "colleague"
    assert rest.get("/api/v1/audit", event_type="teams")["entries"] == []
    assert rest.get("/api/v1/audit", day="2020-01-01")["entries"] == []
    assert len(rest.get("/api/v1/audit", day=datetime.now(UTC).date())["entries"]) >= 8
    assert path not in str(stranger.get("/api/v1/audit"))
    assert "event_type" in str(rest.get("/api/v1/audit", 422, event_type="x"))


def hours() -> tuple[str, str]:
    """The hour that is, and the one before: a test may begin in one and end in the other."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start, end = now - timedelta(hours=1), now + timedelta(hours=1)
    return start.isoformat(), end.isoformat()


def test_usage(rest: Rest, stranger: Rest):
    model = rest.trained(2, user_metadata={"who": "me"})
    session = model.split(":")[0]
    rest.save(model, 5, "kept")
    size = rest.get(f"/api/v1/training_runs/{model}")["last_checkpoint"]["size_bytes"]
    sampler = rest.post(
        "/api/v1/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )["sampling_session_id"]
    rest.tokens(ok(rest.sample(sampler, 0)))
    start, end = hours()
    usage = rest.get("/api/v1/billing/usage/events", starting_on=start, ending_before=end)
    ours: dict[str, float] = {}
    for event in usage["data"]:
        if event["session_id"] == session:
            info = event["event_info"]
            amount = info.get("token_count", info.get("count", info.get("gigabyte_hours")))
            ours[info["type"]] = ours.get(info["type"], 0) + amount
            assert (event["base_model"], event["user_name"]) == (MODEL, "environment")
            assert event.get("estimated_cost_usd", 0) == 0
    assert ours["training"] == 2 * (len(words(1)) - 1)
    assert ours["sampling_prefill"] == len(words(1))
    assert ours["sampling_sample"] == 6
    assert ours["checkpoint"] == 1
    assert 0 < ours["storage"] < size / 1e9
    assert usage["sessions"][session] == {"user_metadata": {"who": "me"}}
    assert session not in str(stranger.get("/api/v1/billing/usage/events", starting_on=start, ending_before=end))
    for wrong in (
        {"starting_on": "2026-01-01T00:30:00Z"},
        {"starting_on": end},
        {"starting_on": "2020-01-01T00:00:00Z"},
    ):
        assert rest.get("/api/v1/billing/usage/events", 400, **({"ending_before": end} | wrong))
    rest.http.put(f"/api/v1/sessions/{session}/project", json={"project_id": f"p-{session}"})
    storage = rest.get("/api/v1/billing/usage/checkpoints/current", project_id=f"p-{session}")
    assert storage["effective_rate_usd_per_gigabyte_month"] == 0
    (line,) = storage["data"]
    assert (line["checkpoint_count"], line["size_bytes"]) == (1, size)
    assert line["size_gigabytes"] == pytest.approx(size / 1e9)
    assert stranger.get("/api/v1/billing/usage/checkpoints/current", project_id=f"p-{session}")["data"] == []


def test_a_token_stands_for_its_key(rest: Rest, gateway: Gateway):
    """In either header, in any dialect; changed by a letter, signed by another key or grown old it is nothing."""
    token = rest.post("/api/v1/auth/token")["jwt"]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 86400
    (team,) = ok(gateway.http().get("/v1/teams"))["teams"]
    assert claims["org_id"] == team["id"]
    with httpx.Client(base_url=gateway.url) as anybody:

        def status(given: str) -> tuple[int, int]:
            by_key = anybody.get("/api/v1/auth/apikey/me", headers={"X-API-Key": given})
            return by_key.status_code, anybody.get(
                "/v1/loops/runs", headers={"Authorization": f"Bearer {given}"}
            ).status_code

        assert status(token) == (200, 200)
        head, body, signature = token.split(".")
        swapped = "A" if signature[0] != "A" else "B"
        old = jwt.encode(claims | {"exp": 1}, hashlib.sha256(KEY.encode()).hexdigest(), algorithm="HS256")
        unsigned = jwt.encode(claims, "", algorithm="none")
        for bad in (f"{head}.{body}.{swapped}{signature[1:]}", f"{head}.{body}.", unsigned, old, "eyJ.x.y"):
            assert status(bad) == (401, 401), bad
        mine = jwt.encode(claims | {"key_id": "nobody"}, "x" * 64, algorithm="HS256")
        assert status(mine) == (401, 401)


def test_a_key_says_whose_it_is_and_goes(gateway: Gateway):
    own = teammate(gateway)
    account = own.get("/api/v1/auth/apikey/me")
    assert account["name"] == "colleague"
    assert account["details"] == {"org_details": {"name": "default"}, "user_details": {"email": "colleague"}}
    assert account["key_id"] > 0
    token = own.post("/api/v1/auth/token")["jwt"]
    assert own.http.delete("/api/v1/auth/apikey/me").status_code == 204
    own.get("/api/v1/auth/apikey/me", 401)
    with_token = {"X-API-Key": token}
    assert own.http.get("/api/v1/auth/apikey/me", headers=with_token).status_code == 401, "it ends with its key"
    revoked = Rest(gateway).get("/api/v1/audit", event_type="organizations")["entries"][-1]
    assert (revoked["event"], revoked["event_details"]["by"]) == ("key.revoked", "colleague")
