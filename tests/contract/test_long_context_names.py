"""Tinker's names for long contexts: ``<model>:peft:<context>`` is the model itself, within its own positions."""

import httpx
import pytest
from test_tinker import Wire

from gateway import MODEL, Gateway, Run, create_run, datum, new_session, ok


@pytest.fixture(scope="module")
def wire(gateway: Gateway) -> Wire:
    return Wire(gateway)


def test_it_is_the_model_within_that_context(http: httpx.Client, wire: Wire):
    assert create_run(http, base_model=f"{MODEL}:peft:256")["max_seq_len"] == 256
    run = Run.create(http, base_model=f"{MODEL}:peft:16").attached()
    run.forward([datum(list(range(3, 19)), list(range(3, 19)))])
    long = list(range(3, 20))
    response = run.post("forward", data=[datum(long, long)], loss_fn="cross_entropy")
    assert (response.status_code, response.json()["details"]["field"]) == (422, "data[0].model_input")

    session = wire.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": f"{MODEL}:peft:64", "lora_config": {"rank": 4}}
    model = wire.result(wire.post("/api/v1/create_model", **body))["model_id"]
    assert wire.loss_sum(wire.loss(model, 1, 1)) > 0


def test_its_checkpoints_are_the_models(http: httpx.Client):
    path = Run.create(http, base_model=f"{MODEL}:peft:128").attached().save("long")
    assert Run.create(http, lora_rank=..., path=path).resource["base_model"] == MODEL


@pytest.mark.parametrize("context", ["257", "9999999999"])
def test_beyond_the_models_context_it_says_what_fits(http: httpx.Client, wire: Wire, context: str):
    body = {"session_id": new_session(http), "base_model": f"{MODEL}:peft:{context}"}
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 422, response.text
    assert f"{MODEL}:peft:256 at most" in response.json()["detail"]
    body = {"session_id": wire.session(), "model_seq_id": 0, "base_model": body["base_model"]}
    answer = wire.http.post("/api/v1/create_model", json=body)
    assert (answer.status_code, f"{MODEL}:peft:256" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "name", ["no/model:peft:16", f"{MODEL}:peft:", f"{MODEL}:peft:x", f"{MODEL}:peft:0", f"{MODEL}:16"]
)
def test_other_names_are_not_known(http: httpx.Client, name: str):
    response = http.post("/v1/loops/runs", json={"session_id": new_session(http), "base_model": name})
    assert response.status_code == 404
    assert ok(http.get("/v1/loops/capabilities", params={"model": name}))["supported_models"] == []
