"""Who calls, what this machine is, and the small routes of a sampler."""

import httpx

from gateway import MODEL, Gateway, Run, ok


def test_who_calls(http: httpx.Client, other_team: httpx.Client):
    mine, theirs = ok(http.get("/v1/users/me")), ok(other_team.get("/v1/users/me"))
    assert mine["email"] != theirs["email"]
    assert theirs["email"] == "other"


def test_this_machine_is_the_one_instance_type(http: httpx.Client):
    (machine,) = ok(http.get("/v1/instance_types"))["instance_types"]
    assert machine["id"] == "local"
    assert machine["memory_limit_mib"] > 0
    (priced,) = ok(http.get("/v1/instance_type_prices"))["instance_types"]
    assert priced["instance_type"] == machine
    assert priced["price"] == 0


def test_models_of_a_team(http: httpx.Client, other_team: httpx.Client):
    (team,) = ok(http.get("/v1/teams"))["teams"]
    assert ok(http.get(f"/v1/teams/{team['id']}/models")) == ok(http.get("/v1/models"))
    assert other_team.get(f"/v1/teams/{team['id']}/models").status_code == 404


def test_a_paired_sampler_reports_its_version_and_health(http: httpx.Client):
    run = Run.create(http).attached()
    sampler = run.resource["sampler"]["id"]
    assert ok(http.get(f"/loops/samplers/{sampler}/trainers_policy_version")) == {"policy_version": 0}
    run.train(1, 2)
    run.do("save_weights_for_sampler", name="live")
    assert ok(http.get(f"/loops/samplers/{sampler}/trainers_policy_version")) == {"policy_version": 2}
    assert ok(http.get(f"/loops/samplers/{sampler}/health")) == {"status": "ready"}


def test_a_link_is_for_its_own_file_only(http: httpx.Client, gateway: Gateway):
    run = Run.create(http).attached()
    run.do("save_weights_for_sampler", name="files")
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    assert checkpoint["base_model"] == MODEL
    files = ok(http.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files"))["presigned_urls"]
    first, second = files[0], files[1]
    keyless = gateway.http(key=None)
    assert len(keyless.get(first["url"]).content) == first["size_bytes"]
    signature = first["url"].partition("?")[2]
    assert signature
    other = f"{second['url'].partition('?')[0]}?{signature}"
    assert keyless.get(other).status_code in (401, 403, 404)


def test_a_served_model_has_no_folders(gateway: Gateway):
    answer = gateway.http(key=None).get(f"/hf/api/models/{MODEL}/tree/main/onnx")
    assert answer.status_code == 404
    assert answer.headers["X-Error-Code"] == "EntryNotFound"
