"""Two worker groups of one base model: each run lives in one, and goes on in the other, bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from test_command_line import Cli

from gateway import KEY, MODEL, Gateway, Json, Run, copy_data, datum, ok, until, words

FIRST, SECOND = MODEL, f"{MODEL}#1"
SEEDS = (3, 1, 4, 1, 5)


@pytest.fixture(scope="module")
def own(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(copy_data(data_template, tmp_path_factory.mktemp("groups") / "data"))
    yield gateway.start(KEY, "--deterministic", "--workers", "2", "--num-threads", "1")
    gateway.close()


@pytest.fixture
def http(own: Gateway) -> Iterator[httpx.Client]:
    client = own.http()
    yield client
    for run in ok(client.get("/v1/loops/runs"))["runs"]:
        ok(client.post(f"/v1/loops/runs/{run['id']}/deactivate"))
    for group in (FIRST, SECOND):
        client.post("/v1/cluster/undrain", json={"group": group})


def groups(http: httpx.Client) -> dict[str, Json]:
    return {group["name"]: group for group in ok(http.get("/v1/cluster"))["groups"]}


def begun(http: httpx.Client, seed: int = 7) -> Run:
    return Run.create(http, seed=seed).attached()


def undisturbed(http: httpx.Client) -> dict[str, bytes]:
    run = begun(http)
    run.train(*SEEDS)
    return run.state()


def test_runs_are_spread_over_the_groups_and_each_has_a_worker(http: httpx.Client, own: Gateway) -> None:
    for _ in range(4):
        begun(http).train(1)
    found = groups(http)
    assert {name: group["num_deployments"] for name, group in found.items()} == {FIRST: 2, SECOND: 2}
    assert {group["state"] for group in found.values()} == {"ready"}
    assert {group["pid"] for group in found.values()} == set(own.worker_pids())
    assert {group["name"] for group in Cli(own).json("cluster", "status")} == {FIRST, SECOND}


def test_a_run_that_is_moved_between_its_operations_learns_the_same(http: httpx.Client) -> None:
    expected = undisturbed(http)
    run = begun(http)
    homes: list[str] = []
    for seed in SEEDS:
        # The gradient is on its way while the run moves.
        passed = run.submit("forward_backward", data=[datum(words(seed))], loss_fn="cross_entropy")
        homes.append(ok(http.post(f"/v1/loops/runs/{run.id}/move", json={}))["group"]["name"])
        stepped = run.submit("optim_step", adam_params={"learning_rate": 1e-2})
        run.result(passed)
        assert run.result(stepped)["metrics"]["step"] == len(homes)
    assert set(homes) == {FIRST, SECOND}
    assert run.state() == expected


def test_a_run_whose_worker_is_killed_goes_on_in_the_other_group(http: httpx.Client) -> None:
    expected = undisturbed(http)
    runs = [begun(http), begun(http)]
    for place, run in enumerate(runs):
        to = (FIRST, SECOND)[place]
        ok(http.post(f"/v1/loops/runs/{run.id}/move", json={"group": to}))
    asked: list[list[str]] = []
    for run in runs:
        ids: list[str] = []
        for seed in SEEDS:
            ids.append(run.submit("forward_backward", data=[datum(words(seed))], loss_fn="cross_entropy"))
            ids.append(run.submit("optim_step", adam_params={"learning_rate": 1e-2}))
        asked.append(ids)
    runs[1].result(asked[1][1])
    os.kill(groups(http)[SECOND]["pid"], signal.SIGKILL)
    for run, ids in zip(runs, asked, strict=True):
        steps = [run.result(id)["metrics"].get("step") for id in ids]
        assert steps[1::2] == [1, 2, 3, 4, 5], "nothing lost, nothing done twice"
        assert run.state() == expected
    until(lambda: groups(http)[SECOND]["num_deployments"] == 0, "its run lives in the other group")
    assert groups(http)[FIRST]["num_deployments"] >= 2


def test_a_drained_group_is_empty_and_takes_nothing(http: httpx.Client, own: Gateway) -> None:
    expected = undisturbed(http)
    runs = [begun(http), begun(http)]
    for run in runs:
        run.train(*SEEDS[:3])
    drained = ok(http.post("/v1/cluster/drain", json={"group": FIRST}))["group"]
    assert drained["drained"]
    assert drained["num_deployments"] == drained["num_samplers"] == 0
    until(lambda: groups(http)[FIRST]["state"] == "stopped", "its worker ends, as nothing needs it")
    runs.append(begun(http))
    runs[2].train(*SEEDS[:3])
    for run in runs:
        run.train(*SEEDS[3:])
        assert run.state() == expected
    assert groups(http)[FIRST]["num_deployments"] == 0
    for path, body, said in (
        ("/v1/cluster/drain", {"group": SECOND}, "only worker group"),
        (f"/v1/loops/runs/{runs[0].id}/move", {"group": FIRST}, "drained"),
        (f"/v1/loops/runs/{runs[0].id}/move", {}, "no other worker group"),
    ):
        refused = http.post(path, json=body)
        assert refused.status_code == 409, refused.text
        assert said in refused.text
    assert "takes runs again" in Cli(own).text("cluster", "drain", FIRST, "--undo")
    assert f"lives in {FIRST}" in Cli(own).text("cluster", "move", runs[0].id, "--to", FIRST)


@pytest.mark.parametrize("path", ["/v1/cluster/drain", "/v1/cluster/undrain"])
def test_an_unknown_group_is_named_with_those_that_there_are(http: httpx.Client, path: str) -> None:
    begun(http)
    refused = http.post(path, json={"group": "elsewhere"})
    assert refused.status_code == 422, refused.text
    assert FIRST in refused.text
    assert "elsewhere" in refused.text


def test_a_group_that_has_nothing_to_do_is_stopped_by_itself(new_gateway: Callable[..., Gateway]) -> None:
    """Scale to zero is each group's own."""
    http = new_gateway("--workers", "2").http()
    lasting = Run.create(http, scale_down_delay_seconds=3600).attached()
    fleeting = Run.create(http, scale_down_delay_seconds=1).attached()
    until(lambda: {g["state"] for g in groups(http).values()} == {"ready", "stopped"}, "one group is stopped")
    fleeting.train(1)
    lasting.train(1)
    assert sum(group["num_deployments"] for group in groups(http).values()) == 2
