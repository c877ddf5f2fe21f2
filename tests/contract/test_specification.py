"""POST /v1/loops/runs against the specification's own schemas, which lie beside this file."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from jsonschema import Draft202012Validator, FormatChecker

from gateway import KEY, MODEL, Gateway, Json, Run, create_run, datum, new_session, ok

SPECIFICATION: Json = json.loads((Path(__file__).parent / "create_run_schemas.json").read_text())
SCHEMAS: Json = SPECIFICATION["components"]["schemas"]
REQUEST = "CreateLoopsRunRequestV1"

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_formats = FormatChecker(formats=())


@_formats.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    return not isinstance(value, str) or (bool(_RFC3339.fullmatch(value)) and bool(datetime.fromisoformat(value)))


def check_answer(answer: Json) -> None:
    """Raises unless ``answer`` is what the specification says."""
    reference = {"$ref": "#/components/schemas/CreateLoopsRunResponseV1"}
    Draft202012Validator(SPECIFICATION | reference, format_checker=_formats).validate(answer)


@pytest.fixture(scope="module")
def our_schemas(http: httpx.Client) -> Json:
    return ok(http.get("/openapi.json"))["components"]["schemas"]


def test_the_check_itself_can_fail():
    with pytest.raises(jsonschema.ValidationError, match="is not a 'date-time'"):
        check_answer({"run": {"created_at": "yesterday"}})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_seq_len": None, "seed": None, "path": None, "reuse_from_session_id": None},
        {"max_seq_len": 64, "lora_rank": 4, "seed": 0, "scale_down_delay_seconds": 600},
    ],
    ids=["least", "nulls", "all"],
)
def test_answer_is_as_specified(http: httpx.Client, fields: Json):
    body = {"session_id": new_session(http), "base_model": MODEL} | fields
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    check_answer(answer)
    run = answer["run"]
    assert (run["session_id"], run["base_model"]) == (body["session_id"], MODEL)
    assert run["lora_rank"] == fields.get("lora_rank", 64)
    created = datetime.fromisoformat(run["created_at"])
    assert abs((datetime.now(created.tzinfo) - created).total_seconds()) < 30
    assert run["sampler"]["base_model"] == MODEL
    # What the answer says is true: the URLs are served.
    assert ok(http.get(run["base_url"] + "/health", params={"base_model": MODEL})) == {"status": "ready"}
    assert ok(http.get(run["sampler"]["base_url"] + "/v1/models"))["data"][0]["id"] == MODEL
    check_answer(ok(http.get(f"/v1/loops/runs/{run['id']}")))


def test_answer_is_as_specified_for_every_sampler_status_it_can_have(http: httpx.Client):
    run = create_run(http)
    readiness = f"/v1/models/{run['sampler']['model_id']}/deployments/{run['sampler']['deployment_id']}"
    assert ok(http.get(readiness))["status"] == "ACTIVE"
    active = ok(http.get(f"/v1/loops/runs/{run['id']}"))
    assert active["run"]["sampler"]["status"]["name"] == "ACTIVE"
    check_answer(active)
    ok(http.post(f"/v1/loops/runs/{run['id']}/deactivate"))
    ended = ok(http.get(f"/v1/loops/runs/{run['id']}"))
    assert ended["run"]["sampler"]["status"]["name"] == "INACTIVE"
    check_answer(ended)


def test_our_openapi_has_the_route(http: httpx.Client):
    operation = ok(http.get("/openapi.json"))["paths"]["/v1/loops/runs"]["post"]
    reference = "#/components/schemas/"
    body = operation["requestBody"]
    assert body["required"] is True
    assert body["content"]["application/json"]["schema"]["$ref"] == reference + REQUEST
    answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["$ref"] == reference + "CreateLoopsRunResponseV1"


@pytest.mark.parametrize("name", SCHEMAS)
def test_our_schema_is_a_compatible_superset(our_schemas: Json, name: str):
    assert name in our_schemas
    theirs, ours = SCHEMAS[name], our_schemas[name]
    assert ours["type"] == theirs["type"]
    assert set(theirs.get("enum", [])) == set(ours.get("enum", []))
    for field, specified in theirs.get("properties", {}).items():
        assert field in ours["properties"], field
        assert _meaning(ours["properties"][field]) == _meaning(specified), field
    required, ours_required = set(theirs.get("required", [])), set(ours.get("required", []))
    if name == REQUEST:
        assert ours_required == required
    else:
        assert ours_required >= required


def _meaning(schema: Json) -> Json:
    """What a schema says, without its prose; an absent default is null."""
    kept: dict[str, Any] = {k: v for k, v in schema.items() if k not in ("title", "description", "examples")}
    return {"default": None} | kept


@pytest.mark.parametrize("scheme", ["Bearer", "Api-Key", "bearer", "api-key"])
def test_both_schemes_are_taken(gateway: Gateway, scheme: str):
    headers = {"Authorization": f"{scheme} {KEY}"}
    anonymous = gateway.http(None)
    session = ok(anonymous.post("/v1/loops/sessions", headers=headers))["session"]["id"]
    body = {"session_id": session, "base_model": MODEL}
    run = ok(anonymous.post("/v1/loops/runs", json=body, headers=headers))["run"]
    assert ok(anonymous.get(f"/loops/runs/{run['id']}/policy_version", headers=headers)) == {"policy_version": 0}


@pytest.mark.parametrize(
    "value",
    [None, "", KEY, "Bearer", f"Basic {KEY}", "Bearer wrong", f"Api-Key {KEY}x", f"Bearer {KEY[:-1]}"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/loops/runs"),
        ("GET", "/v1/loops/runs"),
        ("GET", "/v1/teams"),
        ("GET", "/loops/runs/abcdefg/health"),
        ("POST", "/loops/runs/abcdefg/forward_backward"),
        ("POST", "/loops/samplers/abcdefg/sample"),
    ],
)
def test_without_a_valid_key_401(gateway: Gateway, value: str | None, method: str, path: str):
    headers = {} if value is None else {"Authorization": value}
    response = gateway.http(None).request(method, path, headers=headers, json={} if method == "POST" else None)
    assert response.status_code == 401, response.text
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "key" in response.json()["detail"]


# -- each field has its effect ------------------------------------------------------------------------


def test_seed(http: httpx.Client):
    def trained(**fields: object) -> tuple[dict[str, bytes], list[float]]:
        run = Run.create(http, **fields).attached()
        fresh = run.state()
        run.train(1)
        return fresh, run.logprobs()

    fresh, logprobs = trained(seed=7)
    again, logprobs_again = trained(seed=7)
    other, other_logprobs = trained(seed=8)
    assert fresh == again
    assert logprobs == logprobs_again
    assert fresh != other
    assert logprobs != other_logprobs


def test_a_seed_that_is_not_given_is_chosen_and_reported(http: httpx.Client):
    first, second = create_run(http, seed=None), create_run(http)
    assert first["seed"] != second["seed"]
    assert Run(http, first).attached().state() == Run.create(http, seed=first["seed"]).attached().state()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(http: httpx.Client, seed: int):
    body = {"session_id": new_session(http), "base_model": MODEL, "seed": seed}
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 422
    assert response.json()["detail"].startswith("seed")


@pytest.mark.parametrize(
    ("fields", "rank"), [({"lora_rank": 3}, 3), ({"lora_rank": ...}, 64)], ids=["given", "default"]
)
def test_lora_rank(http: httpx.Client, fields: Json, rank: int):
    run = Run.create(http, **fields)
    run.train(1)
    path = run.save("ranked", "save_weights_for_sampler")
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    assert checkpoint["lora_adapter_config"]["r"] == rank
    files = run.files(path)
    assert json.loads(files["adapter_config.json"])["r"] == rank
    assert _ranks(files["adapter_model.safetensors"]) == {rank}


def _ranks(content: bytes) -> set[int]:
    """Inner dimensions of the LoRA matrices in a safetensors file."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {t["shape"][0] if "lora_A" in name else t["shape"][1] for name, t in header.items() if "lora_" in name}


def test_max_seq_len(http: httpx.Client):
    run = Run.create(http, max_seq_len=16)
    fits, too_long = list(range(3, 19)), list(range(3, 20))
    run.forward([datum(fits, fits)])
    response = run.post("forward_backward", data=[datum(too_long, too_long)], loss_fn="cross_entropy")
    assert response.status_code == 422
    assert "max_seq_len = 16" in response.json()["detail"]
    assert response.json()["details"]["field"] == "data[0].model_input"
    # The run's sampler serves at this length, too.
    response = http.post(run.resource["sampler"]["base_url"] + "/sample", json={"prompt": fits, "max_tokens": 1})
    assert response.status_code == 422
    assert response.json()["details"]["field"] == "prompt"


def test_max_seq_len_defaults_to_the_models(http: httpx.Client):
    assert create_run(http)["max_seq_len"] == 256


@pytest.mark.parametrize("length", [0, -5, 257])
def test_max_seq_len_beyond_the_model(http: httpx.Client, length: int):
    body = {"session_id": new_session(http), "base_model": MODEL, "max_seq_len": length}
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 422
    assert response.json()["detail"].startswith("max_seq_len: 1 to 256 tokens")


def test_path(http: httpx.Client):
    source = Run.create(http, seed=1).attached()
    source.train(1, 2, 3)
    expected = source.logprobs()
    path = source.save("start")
    follower = Run.create(http, seed=2, path=path)
    assert follower.logprobs() == expected
    assert follower.policy_version() == 0
    # A client that attaches gets the weights, too: init goes back to where the run starts.
    assert follower.attached().logprobs() == expected
    # And the sampler that lives with the run serves what the run saves from there.
    assert Run.create(http, seed=3).logprobs() != expected


def test_path_brings_its_rank_and_survives_its_source(http: httpx.Client):
    source = Run.create(http, lora_rank=5, seed=1).attached()
    source.train(1)
    expected, path = source.logprobs(), source.save("start")
    follower = Run.create(http, lora_rank=..., path=path)
    assert follower.resource["lora_rank"] == 5
    source.train(2)
    source.save("start")
    assert follower.logprobs() == expected
    body = {"session_id": new_session(http), "base_model": MODEL, "lora_rank": 6, "path": path}
    response = http.post("/v1/loops/runs", json=body)
    assert (response.status_code, response.json()["details"]["field"]) == (422, "lora_rank")


def test_path_that_does_not_exist(http: httpx.Client):
    session = new_session(http)
    for path, status in (("bt://loops:aaaaaaa/weights/nothing", 404), ("s3://bucket/x", 422), ("bt://x", 422)):
        body = {"session_id": session, "base_model": MODEL, "path": path}
        response = http.post("/v1/loops/runs", json=body)
        assert response.status_code == status, response.text
        assert path in response.json()["detail"]


@pytest.mark.parametrize("delay", [0, -1, 1.5, "60", None])
def test_scale_down_delay_must_be_positive(http: httpx.Client, delay: object):
    body = {"session_id": new_session(http), "base_model": MODEL, "scale_down_delay_seconds": delay}
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 422
    assert response.json()["details"]["field"] == "scale_down_delay_seconds"


def test_reuse_from_session_id(http: httpx.Client):
    session = new_session(http)
    first = create_run(http, session)
    second = create_run(http, reuse_from_session_id=session)
    fresh = create_run(http, session)
    assert second["session_id"] != session
    assert second["deployment_id"] == first["deployment_id"]
    assert second["sampler"]["deployment_id"] == first["sampler"]["deployment_id"]
    assert fresh["deployment_id"] != first["deployment_id"]
    # Sharing is of capacity, never of weights.
    one, two = Run(http, first).attached(), Run(http, second).attached()
    before = two.logprobs()
    one.train(1, 2)
    assert two.logprobs() == before


def test_reuse_is_best_effort(http: httpx.Client):
    session = new_session(http)
    first = create_run(http, session)
    ok(http.post(f"/v1/loops/deployments/{first['deployment_id']}/deactivate"))
    assert create_run(http, reuse_from_session_id=session)["deployment_id"] != first["deployment_id"]
    assert create_run(http, reuse_from_session_id=new_session(http))["deployment_id"] != first["deployment_id"]


def test_reuse_from_run_id(http: httpx.Client):
    first = create_run(http)
    assert create_run(http, reuse_from_run_id=first["id"])["deployment_id"] == first["deployment_id"]
    body = {"session_id": new_session(http), "base_model": MODEL, "reuse_from_run_id": "aaaaaaa"}
    assert http.post("/v1/loops/runs", json=body).status_code == 404


@pytest.mark.parametrize("field", ["session_id", "reuse_from_session_id"])
def test_unknown_session(http: httpx.Client, field: str):
    body = {"session_id": new_session(http), "base_model": MODEL} | {field: "aaaaaaa"}
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 404
    assert response.json()["detail"] == "session 'aaaaaaa' not found"


def test_unknown_base_model_names_the_known_ones(http: httpx.Client):
    body = {"session_id": new_session(http), "base_model": "Qwen/Qwen3-8B"}
    response = http.post("/v1/loops/runs", json=body)
    assert response.status_code == 404
    detail = response.json()["detail"]
    assert "Qwen/Qwen3-8B" in detail
    assert MODEL in detail
