"""Capacity by ``scope``: of each run and sampler its own kind, on one server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway import KEY, MODEL, Gateway, Json, Run, copy_data, datum, new_session, ok, words

RUN_ROUTES = ["/v1/loops/runs", "/v1/loops/trainers", "/v1/loops/debug/trainers"]
SAMPLER_ROUTES = ["/v1/loops/samplers", "/v1/loops/debug/samplers"]


@pytest.fixture(scope="module")
def both(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    own = Gateway(copy_data(data_template, tmp_path_factory.mktemp("both") / "data"))
    own.start(KEY, "--capacity", "both", "--serverless-max-rank", "8", "--serverless-max-seq-len", "64")
    yield own.http()
    own.close()


def ids(run: Json) -> list[str | None]:
    sampler = run["sampler"] or {"model_id": run["deployment_id"], "deployment_id": run["deployment_id"]}
    return [run["deployment_id"], sampler["model_id"], sampler["deployment_id"]]


def asked(http: httpx.Client, **fields: object) -> Json:
    return {"session_id": new_session(http), "base_model": MODEL, "lora_rank": 4} | fields


@pytest.mark.parametrize("route", RUN_ROUTES)
def test_a_run_has_the_capacity_of_its_scope(both: httpx.Client, route: str):
    for scope, kind in (("default", "dedicated"), ("deployment", "dedicated"), ("serverless", "serverless")):
        run = ok(both.post(route, json=asked(both, scope=scope)))["run"]
        assert run["capacity"]["kind"] == kind
        assert [id is None for id in ids(run)] == [kind == "serverless"] * 3
        again = ok(both.get(f"/v1/loops/runs/{run['id']}"))["run"]
        assert (again["deployment_id"], again["capacity"]) == (run["deployment_id"], run["capacity"])


def test_the_routes_of_a_team(both: httpx.Client):
    team = ok(both.get("/v1/teams"))["teams"][0]["id"]
    body = asked(both, scope="serverless")
    run = ok(both.post(f"/v1/teams/{team}/loops/debug/trainers", json=body))["run"]
    assert (run["capacity"]["kind"], run["deployment_id"]) == ("serverless", None)
    body = {"session_id": new_session(both), "base_model": MODEL, "scope": "serverless"}
    sampler = ok(both.post(f"/v1/teams/{team}/loops/debug/samplers", json=body))["sampler"]
    assert (sampler["capacity"]["kind"], sampler["model_id"]) == ("serverless", None)


def test_one_server_serves_both_kinds(both: httpx.Client):
    prompt: Json = {"prompt": words(1), "max_tokens": 4, "temperature": 0}
    answers: list[Json] = []
    for scope, status in (("deployment", 200), ("serverless", 202)):
        run = Run(both, ok(both.post("/v1/loops/runs", json=asked(both, scope=scope, seed=5)))["run"]).attached()
        run.train(1, 2)
        run.save("now", "save_weights_for_sampler")
        url = run.resource["sampler"]["base_url"]
        response = both.post(url + "/sample", json=prompt, headers={"X-Run-Id": run.id})
        assert response.status_code == status, response.text
        if status == 202:
            outcome = ok(both.get(f"{url}/operations/{response.json()['operation_id']}"))
            assert outcome["status"] == "done"
            answers.append(outcome["result"])
        else:
            answers.append(response.json())
        foreign = both.post(url + "/sample", json=prompt, headers={"X-Run-Id": "another"})
        assert (foreign.status_code, foreign.json()["details"]["field"]) == (422, "x-run-id")
    one, other = ([c["token_ids"] for c in answer["choices"]] for answer in answers)
    assert one == other


@pytest.mark.parametrize("route", SAMPLER_ROUTES)
def test_a_sampler_has_the_capacity_of_its_scope(both: httpx.Client, route: str):
    for scope, kind in (("default", "dedicated"), ("deployment", "dedicated"), ("serverless", "serverless")):
        body = {"session_id": new_session(both), "base_model": MODEL, "scope": scope}
        sampler = ok(both.post(route, json=body))["sampler"]
        assert sampler["capacity"]["kind"] == kind
        assert (sampler["model_id"] is None, sampler["deployment_id"] is None) == (kind == "serverless",) * 2
    body = {"session_id": new_session(both), "base_model": MODEL, "scope": "serverless", "max_seq_length": 65}
    refused(both.post(route, json=body), "scope", "at most 64 tokens, and 65 were asked for")


def test_a_paired_sampler_has_its_runs(both: httpx.Client):
    run = ok(both.post("/v1/loops/debug/trainers", json=asked(both, scope="serverless")))["run"]
    body = {"session_id": run["session_id"], "run_id": run["id"]}
    refused(both.post("/v1/loops/samplers", json=body | {"scope": "deployment"}), "scope", "capacity of its run", None)
    sampler = ok(both.post("/v1/loops/samplers", json=body))["sampler"]
    assert (sampler["model_id"], sampler["capacity"]["kind"]) == (None, "serverless")


def refused(response: httpx.Response, field: str, why: str, reason: str | None = "SERVERLESS_UNAVAILABLE") -> None:
    assert response.status_code == 422, response.text
    answer = response.json()
    assert answer["details"]["field"] == field
    assert why in answer["detail"]
    if reason is not None:
        assert answer["details"]["reason"] == reason


def test_serverless_never_falls_back(both: httpx.Client):
    session = new_session(both)
    first = ok(both.post("/v1/loops/runs", json=asked(both, session_id=session)))["run"]
    for fields, why in (
        ({"lora_rank": 9}, "a lora_rank of at most 8, and 9 was asked for"),
        ({"max_seq_len": 65}, "at most 64 tokens, and 65 were asked for"),
        ({"reuse_from_run_id": first["id"]}, f"it reuses the capacity of run {first['id']}"),
        ({"reuse_from_session_id": session}, f"it reuses the capacity of session {session}"),
    ):
        refused(both.post("/v1/loops/runs", json=asked(both, scope="serverless", **fields)), "scope", why)
        assert ok(both.post("/v1/loops/runs", json=asked(both, **fields)))["run"]["capacity"]["kind"] == "dedicated"


def test_what_dedicated_runs_have_is_refused_by_name(both: httpx.Client):
    for field, value in (("replicas", 2), ("sampler_num_replicas", 2), ("availability_model", "spot")):
        response = both.post("/v1/loops/runs", json=asked(both, scope="serverless", **{field: value}))
        refused(response, field, "dedicated capacity", None)
    # What the official client always sends says nothing.
    body = asked(both, scope="serverless", replicas=1, availability_model="dedicated")
    assert ok(both.post("/v1/loops/debug/trainers", json=body))["run"]["deployment_id"] is None
    body = {"session_id": new_session(both), "base_model": MODEL, "scope": "serverless", "num_replicas": 2}
    refused(both.post("/v1/loops/debug/samplers", json=body), "num_replicas", "dedicated capacity", None)


def test_serverless_capacity_is_not_reused(both: httpx.Client):
    lender = ok(both.post("/v1/loops/runs", json=asked(both, scope="serverless")))["run"]
    run = ok(both.post("/v1/loops/runs", json=asked(both, reuse_from_run_id=lender["id"])))["run"]
    assert run["capacity"]["reused"] is False
    assert f"run {lender['id']} has serverless capacity" in run["capacity"]["reason"]


def test_its_own_length_is_the_default(both: httpx.Client):
    run = Run(both, ok(both.post("/v1/loops/runs", json=asked(both, scope="serverless")))["run"]).attached()
    assert run.resource["max_seq_len"] == 64
    long = [3] * 65
    response = run.post("forward", data=[datum(long, long)], loss_fn="cross_entropy")
    assert (response.status_code, response.json()["details"]["field"]) == (422, "data[0].model_input")


@pytest.mark.parametrize("value", ["team", "Serverless", "", None, 1])
def test_other_scopes_are_refused(both: httpx.Client, value: object):
    refused(both.post("/v1/loops/debug/trainers", json=asked(both, scope=value)), "scope", "scope", None)


def test_a_pin_of_a_backend_is_refused(both: httpx.Client):
    body = asked(both, scope="serverless", debug_version="7")
    refused(both.post("/v1/loops/debug/trainers", json=body), "debug_version", "debug_version", None)


def test_capabilities_say_it(both: httpx.Client, http: httpx.Client):
    def serverless(client: httpx.Client, **query: int) -> bool:
        models = ok(client.get("/v1/loops/capabilities", params={"model": MODEL, **query}))["supported_models"]
        return models[0]["serverless"]

    assert serverless(both)
    assert serverless(both, max_seq_len=64)
    assert not serverless(both, max_seq_len=65)
    assert not serverless(http)


def test_a_server_without_serverless_capacity_says_so(http: httpx.Client):
    for route in RUN_ROUTES:
        refused(http.post(route, json=asked(http, scope="serverless")), "scope", f"no serverless capacity for {MODEL}")
        assert ok(http.post(route, json=asked(http, scope="deployment")))["run"]["deployment_id"] is not None
