"""What the Tinker client's retries, reorderings and restarts meet, on the wire."""

from array import array
from collections.abc import Callable

import httpx
import pytest

from gateway import KEY, MODEL, Gateway, Json, Run, create_run, new_session, ok, words
from selfloop.server.tinker import schema

PROTOBUF = {"Content-Type": "application/x-protobuf"}


class Wire:
    """The dialect's routes, called as the SDK calls them."""

    def __init__(self, gateway: Gateway, key: str = f"tml-{KEY}") -> None:
        self.http = gateway.http(None)
        self.http.headers["X-API-Key"] = key

    def post(self, route: str, status: int = 200, **body: object) -> Json:
        return ok(self.http.post(route, json=body), status)

    def session(self) -> str:
        return self.post("/api/v1/create_session", tags=[], sdk_version="0.38.0")["session_id"]

    def model(self, session: str, number: int = 0) -> str:
        lora = {"rank": 4, "seed": 1}
        future = self.post(
            "/api/v1/create_model", session_id=session, model_seq_id=number, base_model=MODEL, lora_config=lora
        )
        return self.result(future)["model_id"]

    def loss(
        self, model: str, seq: int, *seeds: int, forward_only: bool = False, loss_fn: str = "cross_entropy"
    ) -> Json:
        message = schema.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss_fn, forward_only=forward_only)
        for seed in seeds:
            datum = message.data.add()
            tokens = words(seed)
            datum.model_input.add().encoded_text.tokens = array("i", tokens[:-1]).tobytes()
            targets = datum.loss_fn_inputs["target_tokens"]
            targets.dense, targets.dtype = array("q", tokens[1:]).tobytes(), schema.INT64
            targets.shape.append(len(tokens) - 1)
        return ok(self.http.post("/api/v1/forward_backward", content=message.SerializeToString(), headers=PROTOBUF))

    def step(self, model: str, seq: int, learning_rate: float = 1e-2) -> Json:
        return self.post("/api/v1/optim_step", model_id=model, seq_id=seq, adam_params={"learning_rate": learning_rate})

    def poll(self, future: Json) -> httpx.Response:
        while True:
            body = {"request_id": future["request_id"], "allow_metadata_only": True}
            response = self.http.post("/api/v1/retrieve_future", json=body)
            if response.status_code != 408:
                return response

    def result(self, future: Json) -> Json:
        result = ok(self.poll(future))
        assert "error" not in result, result
        return result

    def loss_sum(self, future: Json) -> float:
        response = self.poll(future)
        assert response.headers["content-type"] == "application/x-protobuf", response.text
        message = schema.ForwardBackwardOutput()
        message.ParseFromString(response.content)
        return message.metrics["loss:sum"]

    def sample(self, sampler: str, seq: int, **fields: object) -> httpx.Response:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": words(1)}]}
        body = {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "num_samples": 2}
        body["sampling_params"] = {"max_tokens": 3, "stop": []}
        return self.http.post("/api/v1/asample", json=body | fields)

    def tokens(self, future: Json) -> list[bytes]:
        message = schema.SampleResponse()
        message.ParseFromString(self.poll(future).content)
        return [sequence.tokens for sequence in message.sequences]


@pytest.fixture(scope="module")
def wire(gateway: Gateway) -> Wire:
    return Wire(gateway)


def test_keys(gateway: Gateway):
    for key in (KEY, f"tml-{KEY}"):
        assert Wire(gateway, key).http.post("/api/v1/client/config", json={"sdk_version": "0.38.0"}).status_code == 200
    response = Wire(gateway, "tml-nobody").http.post("/api/v1/client/config", json={})
    assert response.status_code == 401
    assert response.json()["detail"]


def test_what_the_client_asks_around_its_work(wire: Wire):
    assert ok(wire.http.get("/api/v1/healthz")) == {"status": "ok"}
    assert wire.post("/api/v1/client/config", sdk_version="0.38.0")["sample_use_retrieve_futures"] is True
    assert wire.post("/api/v1/client/dynamic_config", sdk_version="0.38.0")["refresh_interval_sec"] >= 10
    models = ok(wire.http.get("/api/v1/get_server_capabilities"))["supported_models"]
    assert MODEL in [model["model_name"] for model in models]
    assert wire.post("/api/v1/telemetry", events=[]) == {"status": "accepted"}


def test_an_unloaded_model_takes_nothing_more(wire: Wire):
    model = wire.model(wire.session())
    assert wire.result(wire.post("/api/v1/unload_model", model_id=model)) == {"model_id": model, "type": "unload_model"}
    response = wire.http.post("/api/v1/optim_step", json={"model_id": model, "seq_id": 1, "adam_params": {}})
    assert response.status_code == 400
    assert "INACTIVE" in response.json()["detail"]


def test_a_repeated_request_runs_once(wire: Wire):
    session = wire.session()
    model = wire.model(session)
    assert wire.model(session) == model
    first = wire.loss(model, 1, 1)
    assert wire.loss(model, 1, 1) == first
    steps = [wire.step(model, 2) for _ in range(3)]
    assert steps[0] == steps[1] == steps[2]
    assert wire.result(steps[0])["metrics"]["step"] == 1
    assert wire.step(model, 2) == steps[0]
    assert wire.result(wire.step(model, 3))["metrics"]["step"] == 2


def test_another_request_under_a_used_number_is_refused_for_good(wire: Wire):
    model = wire.model(wire.session())
    wire.step(model, 1)
    response = wire.http.post(
        "/api/v1/optim_step", json={"model_id": model, "seq_id": 1, "adam_params": {"beta1": 0.5}}
    )
    assert response.status_code == 400
    assert "seq" in response.json()["detail"]


def test_parts_of_a_call_come_in_any_order(wire: Wire):
    """The first part is posted last; nothing runs before it, and nobody waits in a POST."""
    model = wire.model(wire.session())
    later = [wire.loss(model, seq, seq) for seq in (3, 2)]
    step = wire.step(model, 4)
    first = wire.loss(model, 1, 1)
    assert all(wire.loss_sum(future) > 0 for future in (first, *later))
    metrics = wire.result(step)["metrics"]
    assert metrics["num_trained_tokens"] == 3 * (len(words(1)) - 1)


def test_a_refused_operation_keeps_its_place(wire: Wire):
    """Whether it comes in order or ahead of it."""
    model = wire.model(wire.session())
    refused = [wire.loss(model, 2, 1, loss_fn="none"), wire.loss(model, 1, 1, loss_fn="none")]
    again = wire.loss(model, 2, 1, loss_fn="none")
    assert again == refused[0]
    step = wire.step(model, 3)
    for future in refused:
        body = ok(wire.poll(future))
        assert body["category"] == "user"
        assert "loss_fn" in body["error"]
    assert wire.result(step)["metrics"]["step"] == 1


def test_unknown_things(wire: Wire):
    assert wire.http.post("/api/v1/session_heartbeat", json={"session_id": "aaaaaaa"}).status_code == 410
    lost = {"request_id": "sample/aaaaaaas0/0"}
    assert wire.http.post("/api/v1/retrieve_future", json=lost).status_code == 404
    assert wire.http.post("/api/v1/retrieve_future", json={"request_id": "whatever"}).status_code == 410
    model = wire.model(wire.session())
    run = wire.step(model, 1)["request_id"].split("/")[1]
    gone = ok(wire.http.post("/api/v1/retrieve_future", json={"request_id": f"operation/{run}/seq-99"}))
    assert gone["category"] == "server"
    assert wire.http.post("/api/v1/get_info", json={"model_id": "aaaaaaa:train:0"}).status_code == 404
    assert wire.http.post("/api/v1/optim_step", content=b"{").status_code == 400
    assert wire.http.post("/api/v1/optim_step", json={"model_id": model, "seq_id": 1, "nonsense": 1}).status_code == 400
    assert wire.http.post("/api/v1/forward_backward", content=b"\xff" * 20, headers=PROTOBUF).status_code == 400


def test_other_teams_see_nothing(wire: Wire, gateway: Gateway, other_team: httpx.Client):
    model = wire.model(wire.session())
    future = wire.step(model, 1)
    stranger = Wire(gateway, other_team.headers["Authorization"].removeprefix("Bearer "))
    assert stranger.http.post("/api/v1/get_info", json={"model_id": model}).status_code == 404
    assert stranger.http.post("/api/v1/retrieve_future", json=future | {"model_id": model}).status_code == 404
    assert stranger.http.post("/api/v1/optim_step", json={"model_id": model, "seq_id": 2}).status_code == 404


def test_samples_are_computed_once(wire: Wire):
    session = wire.session()
    made = wire.post("/api/v1/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    assert made == wire.post(
        "/api/v1/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )
    sampler = made["sampling_session_id"]
    first = ok(wire.sample(sampler, 7 * 10**17))
    assert ok(wire.sample(sampler, 7 * 10**17)) == first
    assert len(set(first["sample_sequence_ids"])) == 2
    tokens = wire.tokens(first)
    assert wire.tokens(first) == tokens
    assert [len(t) for t in tokens] == [12, 12]
    for field in ({"target_prompt_logprobs": {}}, {"prompt_alt_tokens_k": 129}, {"model_path": "x"}):
        response = wire.sample(sampler, 1, **field)
        assert response.status_code == 400
        assert next(iter(field)) in response.json()["detail"]


def test_a_finished_session_takes_its_snapshots_along(wire: Wire, http: httpx.Client):
    session = wire.session()
    model = wire.model(session)
    saved = wire.result(wire.post("/api/v1/save_weights_for_sampler", model_id=model, seq_id=1, path="kept"))["path"]
    unnamed = {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0}
    sampler = wire.result(wire.post("/api/v1/save_weights_for_sampler", **unnamed))["sampling_session_id"]
    assert len(wire.tokens(ok(wire.sample(sampler, 0)))) == 2
    run = saved.split("/")[2].replace(":train:", "t")
    listed = ok(http.get("/v1/loops/checkpoints", params={"run_id": run}))["checkpoints"]
    assert len(listed) == 1
    assert f"bt://loops:{run}/sampler_weights/kept" in str(listed)
    wire.post(f"/api/v1/sessions/{session}/finish", reason={"type": "success"})
    assert wire.http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
    assert wire.sample(sampler, 1).status_code == 400
    other = wire.session()
    again = wire.post("/api/v1/create_sampling_session", session_id=other, sampling_session_seq_id=0, model_path=saved)
    assert len(wire.tokens(ok(wire.sample(again["sampling_session_id"], 0)))) == 2
    info = ok(wire.http.get(f"/api/v1/samplers/{again['sampling_session_id']}"))
    assert info == {"sampler_id": again["sampling_session_id"], "base_model": MODEL, "model_path": saved}


def test_both_dialects_speak_of_the_same_things(wire: Wire, http: httpx.Client):
    model = wire.model(wire.session())
    wire.loss(model, 1, 1)
    wire.step(model, 2)
    saved = wire.result(wire.post("/api/v1/save_weights", model_id=model, seq_id=3, path="half"))["path"]
    expected = wire.loss_sum(wire.loss(model, 4, 99, forward_only=True))
    ours = saved.replace("tinker://", "bt://loops:").replace(":train:", "t")
    taken_up = Run(http, create_run(http, new_session(http), path=ours, lora_rank=...)).attached()
    assert -sum(taken_up.logprobs()) == pytest.approx(expected, rel=1e-5)
    taken_up.train(3)
    theirs = taken_up.save("from-loops").replace("bt://loops:", "tinker://")
    body = {"session_id": wire.session(), "model_seq_id": 0, "path": theirs, "optimizer": True}
    back = wire.result(wire.post("/api/v1/load_weights", **body))["model_id"]
    assert wire.loss_sum(wire.loss(back, 1, 99, forward_only=True)) == pytest.approx(
        -sum(taken_up.logprobs()), rel=1e-5
    )
    assert wire.result(wire.step(back, 2))["metrics"]["step"] == 2


def test_after_kill_9_operations_go_on_and_samples_are_lost(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    wire = Wire(gateway)
    session = wire.session()
    model = wire.model(session)
    futures = [wire.loss(model, 1, 1), wire.step(model, 2), wire.loss(model, 3, 1, loss_fn="none")]
    sampler = wire.post(
        "/api/v1/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )
    sample = ok(wire.sample(sampler["sampling_session_id"], 0))
    gateway.kill()
    gateway.start()
    wire = Wire(gateway)
    assert wire.step(model, 2) == futures[1]
    assert wire.loss_sum(futures[0]) > 0
    assert wire.result(futures[1])["metrics"]["step"] == 1
    assert ok(wire.poll(futures[2]))["category"] == "user"
    assert wire.poll(sample).status_code == 410
    assert len(wire.tokens(ok(wire.sample(sampler["sampling_session_id"], 1)))) == 2
    assert wire.result(wire.step(model, 4))["metrics"]["step"] == 2
    assert wire.http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 200
