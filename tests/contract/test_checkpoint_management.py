"""Checkpoints that are deleted, kept, validated and deployed; what needs them is never robbed."""

from collections.abc import Callable

import httpx
import pytest

import stores
from gateway import KEY, MODEL, Gateway, Json, Run, create_run, datum, new_session, ok, selfloop, until, words

SAMPLER = "save_weights_for_sampler"


def names(http: httpx.Client, run: Run) -> list[str]:
    return [c["checkpoint_id"] for c in listed(http, run)]


def listed(http: httpx.Client, run: Run) -> list[Json]:
    return ok(http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]


def by_name(http: httpx.Client, run: Run) -> dict[str, Json]:
    return {c["checkpoint_id"]: c for c in listed(http, run)}


def delete(http: httpx.Client, **filters: object) -> Json:
    return ok(http.post("/v1/loops/checkpoints/delete", json=filters))


@pytest.fixture
def run(http: httpx.Client) -> Run:
    return Run.create(http).attached()


# -- deleting -----------------------------------------------------------------------------------------


def test_bulk_deletion_begins_with_a_dry_run(http: httpx.Client, run: Run, gateway: Gateway):
    for name in ("step-1", "step-2", "final"):
        run.save(name)
    run.save("step-3", SAMPLER)
    planned = delete(http, run_id=run.id, name="step-*", target="trainer")
    assert planned["dry_run"] is True
    assert [c["checkpoint_id"] for c in planned["deleted"]] == ["step-2", "step-1"]
    assert planned["size_bytes"] == sum(c["size_bytes"] for c in planned["deleted"]) > 0
    assert names(http, run) == ["step-3", "final", "step-2", "step-1"]

    folders = [stores.checkpoints(gateway.data_dir) / c["id"] for c in planned["deleted"]]
    assert all(folder.is_dir() for folder in folders)
    done = delete(http, run_id=run.id, name="step-*", target="trainer", dry_run=False)
    assert done["deleted"] == planned["deleted"]
    assert names(http, run) == ["step-3", "final"]
    assert not any(folder.exists() for folder in folders)


def test_keep_last_and_age_spare(http: httpx.Client, run: Run):
    for name in ("a", "b", "c"):
        run.save(name)
    kept_two = delete(http, run_id=run.id, keep_last=2, dry_run=False)
    assert [c["checkpoint_id"] for c in kept_two["deleted"]] == ["a"]
    assert delete(http, run_id=run.id, older_than_seconds=3600)["deleted"] == []
    assert len(delete(http, run_id=run.id, older_than_seconds=0)["deleted"]) == 2


def test_what_a_live_sampler_serves_stays(http: httpx.Client, run: Run):
    run.save("old", SAMPLER)
    run.save("live", SAMPLER)
    answer = delete(http, run_id=run.id, name="*", dry_run=False)
    assert [c["checkpoint_id"] for c in answer["deleted"]] == ["old"]
    (kept,) = answer["kept"]
    assert kept["checkpoint"]["checkpoint_id"] == "live"
    assert run.resource["sampler"]["id"] in kept["reason"]
    live = by_name(http, run)["live"]
    refused = http.delete(f"/v1/loops/checkpoints/{live['id']}")
    assert (refused.status_code, refused.json()["details"]["reason"]) == (409, "CHECKPOINT_IN_USE")
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    assert ok(http.delete(f"/v1/loops/checkpoints/{live['id']}"))["id"] == live["id"]
    assert names(http, run) == []
    assert http.delete(f"/v1/loops/checkpoints/{live['id']}").status_code == 404


def test_what_a_queued_load_needs_stays(http: httpx.Client, run: Run):
    path = run.save("needed")
    run.seq += 1  # Its number never comes before the deletion, so the load waits.
    missing = run.seq
    load = run.submit("load_state", path=path)
    (kept,) = delete(http, run_id=run.id, name="needed", dry_run=False)["kept"]
    assert load in kept["reason"]
    ok(run.post("forward", seq=missing, data=[datum(words(1))], loss_fn="cross_entropy"), 202)
    assert run.result(load)["step"] == 0


def test_a_filter_is_needed_and_checked(http: httpx.Client, run: Run):
    for body, field in (
        ({}, "filter"),
        ({"dry_run": False}, "filter"),
        ({"run_id": run.id, "keep_last": -1}, "keep_last"),
        ({"run_id": run.id, "target": "neither"}, "target"),
        ({"run_id": run.id, "nmae": "x"}, "nmae"),
    ):
        refused = http.post("/v1/loops/checkpoints/delete", json=body)
        assert (refused.status_code, refused.json()["details"]["field"]) == (422, field)
    assert http.post("/v1/loops/checkpoints/delete", json={"run_id": "nothere"}).status_code == 404


def test_only_the_callers_own_runs_unless_asked(http: httpx.Client, run: Run, gateway: Gateway):
    run.save("mine")
    made = selfloop("keys", "create", "mate", "--data-dir", str(gateway.data_dir))
    mate = gateway.http(made.split()[-1])
    assert delete(mate, base_model=MODEL)["deleted"] == []
    theirs = [c["run_id"] for c in delete(mate, base_model=MODEL, scope="org")["deleted"]]
    assert run.id in theirs
    params = {"base_model": MODEL}
    assert ok(mate.get("/v1/loops/checkpoints", params=params))["checkpoints"] == []
    org = ok(mate.get("/v1/loops/checkpoints", params=params | {"scope": "org"}))["checkpoints"]
    assert run.id in [c["run_id"] for c in org]


def test_a_run_keeps_its_last_checkpoints(http: httpx.Client):
    run = Run.create(http, keep_last_checkpoints=2).attached()
    assert run.resource["keep_last_checkpoints"] == 2
    run.save("w1", SAMPLER)
    for name in ("s1", "s2", "s3"):
        run.save(name)
    assert names(http, run) == ["s3", "s2", "w1"]
    for value in (0, -1):
        refused = http.post(
            "/v1/loops/runs",
            json={"session_id": new_session(http), "base_model": MODEL, "keep_last_checkpoints": value},
        )
        assert (refused.status_code, refused.json()["details"]["field"]) == (422, "keep_last_checkpoints")


def test_the_live_adapter_outlasts_keep_last(http: httpx.Client):
    run = Run.create(http, keep_last_checkpoints=1).attached()
    run.save("live", SAMPLER)
    run.do(SAMPLER, name="aside", bump_version=False)
    assert set(names(http, run)) == {"live", "aside"}
    sampled = http.post(
        f"/loops/samplers/{run.resource['sampler']['id']}/sample", json={"prompt": words(1), "max_tokens": 1}
    )
    ok(sampled)
    run.save("next", SAMPLER)
    assert names(http, run) == ["next"]


# -- the answer says which capacity ------------------------------------------------------------------


def test_reuse_is_reported(http: httpx.Client):
    first = create_run(http)
    assert first["capacity"] == {
        "kind": "dedicated",
        "reused": False,
        "reused_from": None,
        "reason": "fresh: nothing to reuse was named",
    }
    second = create_run(http, reuse_from_run_id=first["id"])
    assert (second["capacity"]["reused"], second["capacity"]["reused_from"]) == (True, first["id"])
    assert second["deployment_id"] == first["deployment_id"]
    assert second["sampler"]["capacity"]["reused_from"] == first["sampler"]["id"]
    ok(http.post(f"/v1/loops/deployments/{first['deployment_id']}/deactivate"))
    third = create_run(http, reuse_from_run_id=first["id"])
    assert third["capacity"]["reused"] is False
    assert "STOPPED" in third["capacity"]["reason"]
    assert ok(http.get(f"/v1/loops/runs/{third['id']}"))["run"]["capacity"] == third["capacity"]


# -- deploying ----------------------------------------------------------------------------------------


def deploy(http: httpx.Client, ids: list[str], name: str, **fields: object) -> httpx.Response:
    body = {"checkpoint_ids": ids, "model_name": name, "instance_type_id": "local", "hf_secret_name": "hf"}
    return http.post("/v1/loops/checkpoints/deploy", json=body | fields)


def sampler_of(http: httpx.Client, deployed: Json) -> Json:
    samplers = ok(http.get("/v1/loops/samplers"))["samplers"]
    (found,) = [s for s in samplers if s["deployment_id"] == deployed["deployment_id"]]
    return found


def test_a_deploy_serves_its_checkpoints_whatever_becomes_of_them(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    http = own.http()
    run = Run.create(http).attached()
    run.train(1)
    first = run.save("first", SAMPLER)
    run.train(2)
    second = run.save("second", SAMPLER)
    found = by_name(http, run)
    deployed = ok(deploy(http, [found["first"]["id"], found["second"]["id"]], "captain"))
    sampler = sampler_of(http, deployed)
    assert sampler["standing"] is True
    base = f"/loops/samplers/{sampler['id']}"
    readiness = f"/v1/models/{deployed['model_id']}/deployments/{deployed['deployment_id']}"
    assert ok(http.get(readiness))["checkpoints"] == [first, second]
    assert [m["id"] for m in ok(http.get(f"{base}/v1/models"))["data"]] == [MODEL, first, second]

    def sampled(**body: object) -> tuple[str, list[int]]:
        headers = {"X-Checkpoint-Path": str(body.pop("pinned"))} if "pinned" in body else {}
        request = {"prompt": words(5), "max_tokens": 6, "temperature": 0} | body
        answer = http.post(f"{base}/sample", json=request, headers=headers)
        return answer.headers["x-trainers-policy-version"], ok(answer)["choices"][0]["token_ids"]

    assert sampled() == sampled(pinned=first) == sampled(model="first") == sampled(model=first)
    assert sampled(model="second") == sampled(pinned=second)
    assert (sampled()[0], sampled(model="second")[0]) == ("1", "2")
    before = sampled(), sampled(model="second")

    # The originals go: the run ends, one is replaced by another of its name, both are deleted.
    run.train(3)
    run.save("first", SAMPLER)
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    assert delete(http, run_id=run.id, name="*", dry_run=False)["kept"] == []
    assert (sampled(), sampled(model="second")) == before

    # A restart brings it up by itself, and only it.
    own.kill()
    own.start()
    http = own.http(KEY)
    until(lambda: ok(http.get(readiness))["status"] == "ACTIVE", "the deployed sampler is up again")
    assert (sampled(), sampled(model="second")) == before

    ok(http.post(f"/v1/loops/samplers/{sampler['id']}/deactivate"))
    assert ok(http.get(readiness))["status"] == "INACTIVE"
    assert list((own.data_dir / "held").iterdir()) == []


def test_a_second_deploy_is_a_further_version(http: httpx.Client, run: Run):
    run.save("w", SAMPLER)
    id = by_name(http, run)["w"]["id"]
    first, second = (ok(deploy(http, [id], f"versions-{run.id}")) for _ in range(2))
    assert first["model_id"] == second["model_id"]
    assert first["deployment_id"] != second["deployment_id"]
    model = ok(http.get(f"/v1/models/{first['model_id']}"))
    assert (model["deployments_count"], model["production_deployment_id"]) == (2, second["deployment_id"])
    deployments = ok(http.get(f"/v1/models/{first['model_id']}/deployments"))["deployments"]
    assert [d["name"] for d in deployments] == [f"versions-{run.id}-2", f"versions-{run.id}-1"]
    assert [d["is_production"] for d in deployments] == [True, False]
    for made in (first, second):
        route = f"/v1/models/{made['model_id']}/deployments/{made['deployment_id']}/deactivate"
        assert ok(http.post(route)) == {"success": True, "no_op": False}
        assert ok(http.post(route)) == {"success": True, "no_op": True}


def test_a_deploy_that_cannot_be_is_refused(http: httpx.Client, run: Run):
    run.save("state")
    run.save("weights", SAMPLER)
    found = by_name(http, run)
    weights = found["weights"]["id"]
    for ids, fields, status, field in (
        ([found["state"]["id"]], {}, 422, "checkpoint_ids"),
        ([], {}, 422, "checkpoint_ids"),
        ([weights, weights], {}, 422, "checkpoint_ids"),
        (["nothere"], {}, 404, None),
        ([weights], {"instance_type_id": "H100:8"}, 422, "instance_type_id"),
        ([weights], {"hf_secret_name": " "}, 422, "hf_secret_name"),
        ([weights], {"model_name": ""}, 422, "model_name"),
    ):
        refused = deploy(http, ids, "refused", **fields)
        assert (refused.status_code, refused.json()["details"].get("field")) == (status, field), refused.text
    assert ok(http.get("/v1/models", params={"name": "refused"}))["models"] == []
