"""Logs, metrics, debug archives, Prometheus and usage of a real gateway, over HTTP."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import stores
from gateway import KEY, Gateway, Json, Run, copy_data, create_run, datum, ok, selfloop, until, words

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def gateway(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of these tests' own: they count everything on it, from the worker's start on."""
    own = Gateway(copy_data(data_template, tmp_path_factory.mktemp("observed") / "data")).start()
    yield own
    own.close()


@pytest.fixture(scope="module")
def http(gateway: Gateway) -> httpx.Client:
    return gateway.http()


@pytest.fixture(scope="module")
def other_team(gateway: Gateway) -> httpx.Client:
    made = selfloop("keys", "create", "other", "--team", "other", "--data-dir", str(gateway.data_dir))
    return gateway.http(made.split()[-1])


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    """A run that has trained for two steps, saved, failed at nothing, and sampled twice."""
    made = Run.create(http).attached()
    made.train(1, 2)
    made.save("first", "save_weights_for_sampler")
    for _ in range(2):
        sample(made)
    return made


def sample(run: Run, **headers: str) -> Json:
    body = {"prompt": words(3, 5), "max_tokens": 4, "temperature": 0, "n": 2, "logprobs": 0}
    path = f"/loops/samplers/{run.resource['sampler']['id']}/sample"
    return ok(run.http.post(path, json=body, headers=headers))


def logs(run: Run, **params: object) -> list[Json]:
    path = f"/v1/loops/deployments/{run.resource['deployment_id']}/logs"
    return ok(run.http.get(path, params=params))["logs"]


def sampler_path(run: Run) -> str:
    sampler = run.resource["sampler"]
    return f"/v1/models/{sampler['model_id']}/deployments/{sampler['deployment_id']}/logs"


def messages(lines: list[Json]) -> str:
    return "\n".join(line["message"] for line in lines)


# -- logs -------------------------------------------------------------------------------------------------


def test_a_deployments_log_has_its_story(run: Run):
    lines = logs(run, direction="asc", limit=1000)
    text = messages(lines)
    for part in (
        "-> RUNNING",
        "worker of tiny/llama: ready",
        "init_trainer_server accepted (seq_id 1)",
        "forward_backward (seq_id 2) handed to the worker",
        "save_weights_for_sampler (seq_id 6) finished",
        "checkpoint 'first' of step 2",
    ):
        assert part in text, text
    assert re.search(r"forward_backward \(seq_id 2\) finished in [\d.]+ s, [\d.]+ s of it computing, 11 tokens", text)
    stamps = [int(line["timestamp"]) for line in lines]
    assert stamps == sorted(stamps)
    assert abs(stamps[-1] / 1e9 - time.time()) < 3600
    assert {line["level"] for line in lines} >= {"DEBUG", "INFO"}
    assert {line["replica"] for line in lines} == {"local"}
    assert any(line["request_id"] for line in lines)


def test_direction_limit_and_level(run: Run):
    everything = logs(run, limit=1000)
    assert [line["timestamp"] for line in everything] == sorted((x["timestamp"] for x in everything), reverse=True)
    assert logs(run, limit=2) == everything[:2]
    assert logs(run, direction="asc", limit=2) == everything[::-1][:2]
    assert {line["level"] for line in logs(run, min_level="INFO", limit=1000)} <= {"INFO", "WARNING", "ERROR"}
    assert len(logs(run, min_level="DEBUG", limit=1000)) == len(everything)


def test_the_window_is_obeyed(run: Run):
    newest = logs(run, limit=1)[0]
    at_ms = int(newest["timestamp"]) // 1_000_000
    assert logs(run, start_epoch_millis=at_ms + 1000, end_epoch_millis=at_ms + 2000) == []
    assert newest in logs(run, start_epoch_millis=at_ms, end_epoch_millis=at_ms + 1000)
    assert newest not in logs(run, start_epoch_millis=at_ms - 86_400_000, end_epoch_millis=at_ms - 1000, limit=1000)


def test_the_samplers_log_is_its_own(run: Run):
    lines = ok(run.http.get(sampler_path(run)))["logs"]
    text = messages(lines)
    assert text.count("sampled 2 sequences, 8 tokens after a prompt of 5") == 2
    assert "forward_backward" not in text
    assert "sampled" not in messages(logs(run))
    line = next(line for line in lines if line["message"].startswith("sampled"))
    by_body = run.http.post(sampler_path(run), json={"request_id": line["request_id"]})
    assert ok(by_body)["logs"] == [line]
    by_text = run.http.post(sampler_path(run), json={"includes": ["sampled 2"], "excludes": ["nothing like it"]})
    assert len(ok(by_text)["logs"]) == 2
    assert ok(run.http.post(sampler_path(run), json={"replica": "other"}))["logs"] == []


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"direction": "up"}, "direction"),
        ({"min_level": "LOUD"}, "min_level"),
        ({"start_epoch_millis": 0, "end_epoch_millis": 700_000_000}, "start_epoch_millis"),
        ({"start_epoch_millis": 2, "end_epoch_millis": 1}, "start_epoch_millis"),
        ({"end_epoch_millis": -1}, "end_epoch_millis"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_log_query_is_named(run: Run, params: dict[str, Any], field: str):
    response = run.http.get(f"/v1/loops/deployments/{run.resource['deployment_id']}/logs", params=params)
    assert response.status_code == 422
    assert response.json()["details"]["field"] == field
    assert run.http.get(sampler_path(run), params=params).status_code == 422


@pytest.mark.parametrize("body", [{"component": "x"}, {"search_pattern": "x"}, {"includes": ["x"] * 9}, {"other": 1}])
def test_what_a_sampler_log_does_not_offer_is_refused(run: Run, body: Json):
    response = run.http.post(sampler_path(run), json=body)
    assert response.status_code == 422
    assert response.json()["details"]["field"] == next(iter(body))


def test_failures_and_cancellations_are_reported_with_their_cause(http: httpx.Client, gateway: Gateway):
    own = Run.create(http).attached()
    path = own.save("broken")
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": path}))["checkpoints"]
    stores.damage(gateway.data_dir, checkpoint["id"], "adapter_model.safetensors")
    failed = own.submit("load_state", path=path)
    cause = own.outcome(failed)["error"]
    parked = ok(own.post("forward", seq=99, data=[datum(words(1))], loss_fn="cross_entropy"), 202)["operation_id"]
    ok(http.post(f"{own.path}/operations/{parked}/cancel"))
    lines = {line["request_id"]: line for line in logs(own, min_level="INFO")}
    assert lines[failed]["level"] == "WARNING"
    assert lines[failed]["message"].endswith(f"s: {cause}")
    assert "forward (seq_id 99) was cancelled" in lines[parked]["message"]


def test_another_teams_deployment_is_absent(run: Run, other_team: httpx.Client):
    id = run.resource["deployment_id"]
    theirs = Run.create(other_team).attached()
    theirs.train(9)
    assert other_team.get(f"/v1/loops/deployments/{id}/logs").status_code == 404
    assert other_team.get(sampler_path(run)).status_code == 404
    assert other_team.post(f"/v1/loops/deployments/{id}/metrics", json={}).status_code == 404
    assert other_team.get(f"/v1/loops/deployments/{id}/debug_archive/files").status_code == 404
    assert other_team.get("/v1/loops/usage", params={"run_id": run.id}).status_code == 404
    own, foreign = json.dumps(logs(run, limit=1000)), json.dumps(logs(theirs, limit=1000))
    assert theirs.id not in own
    assert theirs.resource["deployment_id"] not in own
    assert run.id not in foreign
    assert id not in foreign


def test_neither_keys_nor_tokens_are_logged(run: Run, gateway: Gateway):
    logs(run)
    stored = "".join(path.read_text() for path in (gateway.data_dir / "logs").glob("*"))
    assert KEY not in stored
    assert ",".join(map(str, words(1)[:4])) not in stored.replace(" ", "")


def test_a_dead_workers_cause_is_in_the_log(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    own = Run.create(gateway.http()).attached()
    gateway.kill_worker()
    own.train(1)
    text = messages(logs(own, limit=1000, direction="asc"))
    assert "restarting: worker process was killed by SIGKILL" in text
    assert "loaded " in text, "the tail of its output"
    assert text.index("SIGKILL") < text.rindex("-> RUNNING")


def test_the_clients_trace_is_in_the_log_lines(run: Run, gateway: Gateway):
    sample(run, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    logs(run)
    stored = (gateway.data_dir / "logs" / "events.jsonl").read_text()
    assert any(TRACE in line and "sampled" in line for line in stored.splitlines())


# -- metrics ----------------------------------------------------------------------------------------------


def metrics(run: Run, **body: object) -> Json:
    answer = ok(run.http.post(f"/v1/loops/deployments/{run.resource['deployment_id']}/metrics", json=body))
    assert answer["deployment_id"] == run.resource["deployment_id"]
    return answer["metrics"]


def test_metrics_are_measured(run: Run):
    found = until(lambda: (m := metrics(run)) and m["cpu_memory_usage_bytes"] and m, "the worker was looked at")
    assert found["cpu_memory_usage_bytes"][-1]["value"] > 50 * 2**20
    assert 0 <= found["cpu_usage"][-1]["value"] < 64
    assert found["gpu_memory_usage_bytes"] == {}
    storage = found["ephemeral_storage"]
    assert storage["usage_bytes"][-1]["value"] > 0
    assert 0 < storage["utilization"][-1]["value"] <= 1
    (node,) = found["per_node_metrics"]
    assert node["node_id"] == "local"
    assert node["cpu_usage"] == found["cpu_usage"]
    times = [point for point in found["response_time_stats"] if point["p50"] is not None]
    assert times
    assert all(0 < point["p50"] <= point["p95"] <= point["p99"] for point in times)
    assert all(point["value"] >= 0 for point in found["concurrent_requests"])


def test_sampler_and_trainer_are_compared_after_a_publish(new_gateway: Callable[[], Gateway]):
    """The gap is a metric, and the text that it is measured by is nobody's sample."""
    gateway = new_gateway()
    own = Run.create(gateway.http()).attached()
    own.save("fresh", "save_weights_for_sampler")
    until(
        lambda: "the published weights equal the base model" in messages(logs(own, min_level="WARNING")), "the warning"
    )
    own.train(1, 2)
    own.save("trained", "save_weights_for_sampler")
    name = "selfloop_publish_logprob_gap"
    found = until(lambda: (s := series(own.http.get("/metrics").text))[f"{name}_count"] == 2 and s, "both are measured")
    bound = 1e-3 if found[f'{name}_bucket{{le="0.001"}}'] == 2 else 0.2
    assert found[f"{name}_sum"] <= 2 * bound
    assert found["selfloop_publishes_out_of_bounds_total"] == 0
    assert "sampler and trainer differ" not in messages(logs(own, limit=1000))
    points = metrics(own, step_seconds=86_400)["publish_logprob_gap"]
    assert all(0 <= point["value"] <= bound for point in points)
    assert points
    assert [line["samples"] for line in usage(own.http, run_id=own.id)] == [0]
    assert found["selfloop_samples_total"] == 0


def test_volumes_by_status_add_up(http: httpx.Client):
    own = Run.create(http).attached()
    own.train(1)
    sample(own)
    assert own.post("forward", seq=99, data=[], loss_fn="cross_entropy").status_code == 422
    now = int(time.time() * 1000)
    window = {"start_epoch_millis": now - 7_200_000, "end_epoch_millis": now + 60_000}
    found = metrics(own, **window, step_seconds=86_400, time_divisor_seconds=86_400)
    (point,) = found["inference_volume_by_status"]
    seconds = time.time() % 86_400
    if seconds > 60:  # Not over midnight.
        counts = [round(point[f"status_{kind}xx"] * seconds / 86_400) for kind in (2, 4, 5)]
        assert counts == [4, 1, 0]
    assert found["inference_volume"][0]["value"] == pytest.approx(sum(point[f"status_{kind}xx"] for kind in (2, 4, 5)))
    assert metrics(own, start_epoch_millis=0, end_epoch_millis=1000)["inference_volume"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"step_seconds": 30}, "step_seconds"),
        ({"step_seconds": 90}, "step_seconds"),
        ({"step_seconds": "60"}, "step_seconds"),
        ({"time_divisor_seconds": 0}, "time_divisor_seconds"),
        ({"start_epoch_millis": 5, "end_epoch_millis": 4}, "start_epoch_millis"),
        ({"start_epoch_millis": 0}, "start_epoch_millis"),
        ({"resolution": 1}, "resolution"),
    ],
)
def test_a_wrong_metrics_request_is_named(run: Run, body: Json, field: str):
    response = run.http.post(f"/v1/loops/deployments/{run.resource['deployment_id']}/metrics", json=body)
    assert response.status_code == 422
    assert response.json()["details"]["field"] == field


def test_metrics_and_usage_survive_a_restart(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    own = Run.create(gateway.http()).attached()
    own.train(1)
    before = metrics(own, step_seconds=3600)["response_time_stats"]
    usage_before = usage(own.http, run_id=own.id)
    gateway.terminate()
    gateway.start()
    after = metrics(own, step_seconds=3600)["response_time_stats"]
    assert [point["p50"] for point in after] == [point["p50"] for point in before]
    assert usage(own.http, run_id=own.id) == usage_before
    assert "forward_backward" in messages(logs(own)), "the log goes on, too"


# -- debug archive ----------------------------------------------------------------------------------------


def test_the_debug_archive_is_downloaded_without_a_key(run: Run):
    path = f"/v1/loops/deployments/{run.resource['deployment_id']}/debug_archive/files"
    answer = ok(run.http.get(path))
    assert answer["next_page_token"] is None
    files = {f["relative_file_name"]: httpx.get(f["url"]).raise_for_status() for f in answer["presigned_urls"]}
    assert set(files) == {"logs.jsonl", "worker.log", "status_history.json", "versions.json", "machine.json"}
    assert all(f["size_bytes"] == len(files[f["relative_file_name"]].content) for f in answer["presigned_urls"])
    lines = [json.loads(line) for line in files["logs.jsonl"].text.splitlines()]
    assert [line["at_ns"] for line in lines] == sorted(line["at_ns"] for line in lines)
    assert any("finished" in line["message"] for line in lines)
    assert any("sampled" in line["message"] for line in lines)
    assert "loaded " in files["worker.log"].text
    assert any(change["status"] == "RUNNING" for change in files["status_history.json"].json())
    assert files["versions.json"].json()["selfloop"] or files["versions.json"].json()["python"]
    assert files["machine.json"].json()["num_cpus"] >= 1
    assert KEY not in "".join(response.text for response in files.values())


def test_the_archives_pages_are_of_one_archive(run: Run):
    path = f"/v1/loops/deployments/{run.resource['deployment_id']}/debug_archive/files"
    names: list[str] = []
    urls: set[str] = set()
    params: dict[str, object] = {"page_size": 2}
    while True:
        answer = ok(run.http.get(path, params=params))
        names += [f["relative_file_name"] for f in answer["presigned_urls"]]
        urls |= {f["url"].split("/")[-2] for f in answer["presigned_urls"]}
        if answer["next_page_token"] is None:
            break
        params["page_token"] = answer["next_page_token"]
    assert len(names) == len(set(names)) == 5
    assert len(urls) == 1
    for token in ("x", "x:1", f"{run.resource['deployment_id']}-abc:0", "../../x:0", ":0"):
        assert run.http.get(path, params={"page_token": token}).status_code == 422, token
    assert run.http.get(path, params={"page_size": 0}).status_code == 422


def test_a_tampered_archive_link_is_refused(run: Run):
    base = str(run.http.base_url).rstrip("/")
    path = f"/v1/loops/deployments/{run.resource['deployment_id']}/debug_archive/files"
    url = ok(run.http.get(path, params={"page_size": 1}))["presigned_urls"][0]["url"]
    assert httpx.get(url.replace("logs.jsonl", "worker.log")).status_code == 401
    assert httpx.get(re.sub(r"expires=\d+", "expires=99999999999", url)).status_code == 401
    assert httpx.get(url + "0").status_code == 401
    archive = url.split("/")[-2]
    forged = {"expires": 99_999_999_999, "signature": "0" * 64}
    assert httpx.get(f"{base}/debug_archives/{archive}/logs.jsonl", params=forged).status_code == 401
    assert httpx.get(f"{base}/debug_archives/{archive}/logs.jsonl").status_code == 422


# -- Prometheus -------------------------------------------------------------------------------------------


def series(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    }


def test_prometheus_counts_without_ids(run: Run):
    run.forward([datum(words(5))])
    response = run.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found = series(response.text)
    template = "/loops/runs/{run_id}/forward_backward"
    assert found[f'selfloop_requests_total{{method="POST",route="{template}",status="202"}}'] >= 2
    assert found[f'selfloop_request_seconds_count{{method="POST",route="{template}"}}'] >= 2
    assert found['selfloop_operations_accepted_total{kind="optim_step"}'] >= 2
    assert found['selfloop_operations_finished_total{kind="optim_step"}'] >= 2
    assert found['selfloop_tokens_total{use="trained"}'] > 0
    assert found['selfloop_tokens_total{use="sampled"}'] >= 16
    assert found['selfloop_workers{state="ready"}'] == 1
    assert found['selfloop_resident_bytes{process="gateway"}'] > 2**20
    assert found['selfloop_resident_bytes{process="workers"}'] > 2**20
    assert found["selfloop_checkpoint_bytes"] > 0
    assert {"selfloop_queued_operations", "selfloop_waiting_polls"} <= set(found)
    for id in (run.id, run.resource["deployment_id"], run.resource["sampler"]["id"]):
        assert id not in response.text


def test_prometheus_needs_a_key(gateway: Gateway):
    assert httpx.get(f"{gateway.url}/metrics").status_code == 401


# -- usage ------------------------------------------------------------------------------------------------


def usage(http: httpx.Client, **params: object) -> list[Json]:
    return ok(http.get("/v1/loops/usage", params=params))["usage"]


def test_usage_of_a_run_is_exact(http: httpx.Client, gateway: Gateway):
    own = Run.create(http, name="counted").attached()
    masked = datum(words(1), targets=None)
    own.forward_backward([masked, datum(words(2))])
    own.forward([datum(words(3))])
    own.step()
    own.save("kept")
    sample(own)
    (line,) = usage(http, run_id=own.id)
    assert (line["id"], line["name"]) == (own.id, "counted")
    counts = {name: line[name] for name in line if name.startswith(("tokens", "operations", "samples"))}
    assert counts == {
        "operations": 5,
        "samples": 1,
        "tokens_trained": 22,
        "tokens_forwarded": 33,
        "tokens_prefilled": 5,
        "tokens_sampled": 8,
    }
    assert 0 < line["compute_seconds"] < 60
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"run_id": own.id}))["checkpoints"]
    assert line["checkpoint_bytes"] == checkpoint["size_bytes"]

    until(lambda: _cli_usage(gateway).get(own.id, {}).get("samples") == 1, "samples are written within seconds")
    printed = _cli_usage(gateway)[own.id]
    assert {name: printed[name] for name in counts} == counts
    assert "counted" in selfloop("usage", "--since", "1d", "--data-dir", str(gateway.data_dir))


def test_samples_count_for_the_run_that_trained_their_weights(http: httpx.Client, other_team: httpx.Client):
    """Of a sampler that has no run itself; another team's samples of a published checkpoint are none of this run's."""
    own = Run.create(http, name="sampled elsewhere").attached()
    own.train(1)
    own.save("kept", "save_weights_for_sampler")
    name = f"bt://loops:{own.id}/sampler_weights/kept"
    body = {"session_id": own.resource["session_id"], "model_path": name}
    alone = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
    assert alone["run_id"] is None
    asked = {"prompt": words(4), "max_tokens": 3, "stop_token_ids": []}
    ok(http.post(f"/loops/samplers/{alone['id']}/sample", json=asked))
    (line,) = usage(http, run_id=own.id)
    assert (line["samples"], line["tokens_prefilled"]) == (1, len(asked["prompt"]))
    assert http.post(f"/api/v1/training_runs/{own.id}/checkpoints/sampler_weights/kept/publish").status_code == 204
    ok(other_team.post("/oai/api/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1}))
    assert usage(http, run_id=own.id) == [line]
    assert own.id not in {other["id"] for other in usage(other_team, scope="org")}


def _cli_usage(gateway: Gateway) -> dict[str, Json]:
    printed = json.loads(selfloop("usage", "--json", "--data-dir", str(gateway.data_dir)))
    return {line["run_id"]: line for line in printed}


def test_usage_by_key_and_team(run: Run, gateway: Gateway, other_team: httpx.Client):
    second = gateway.http(selfloop("keys", "create", "second", "--data-dir", str(gateway.data_dir)).split()[-1])
    Run(second, create_run(second)).attached()
    names = {line["name"]: line for line in usage(run.http, group_by="key", scope="org")}
    assert names["second"]["operations"] == 1
    assert [line["name"] for line in usage(second, group_by="key")] == ["second"]
    (team,) = usage(run.http, group_by="team", scope="org")
    assert team["operations"] == sum(line["operations"] for line in names.values())
    assert team["name"] == "default"
    assert all(line["name"] != "default" for line in usage(other_team, group_by="team", scope="org"))
    assert json.loads(selfloop("usage", "--by", "team", "--json", "--data-dir", str(gateway.data_dir)))


def test_the_window_of_usage(run: Run):
    assert usage(run.http, run_id=run.id, end="2020-01-01T00:00:00Z")[0]["operations"] == 0
    assert usage(run.http, run_id=run.id, start="2020-01-01T00:00:00Z")[0]["operations"] > 0
    for params, field in (
        ({"start": "2020-01-01T00:00:00"}, "start"),
        ({"start": "2021-01-01T00:00:00Z", "end": "2020-01-01T00:00:00Z"}, "start"),
        ({"group_by": "day"}, "group_by"),
        ({"end": "soon"}, "end"),
    ):
        response = run.http.get("/v1/loops/usage", params=params)
        assert response.status_code == 422
        assert response.json()["details"]["field"] == field
