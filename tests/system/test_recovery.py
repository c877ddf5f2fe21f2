"""Anything may be killed at any instant: what was accepted gets its result, once, and the numbers are the same."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import stores
from gateway import KEY, Gateway, Json, Run, copy_data, datum, environment, is_gone, ok, selfloop, until, words

NUM_STEPS = 24
# A server ends by the signal that it was sent, once it has stopped in order.
STOPPED = (0, -signal.SIGTERM)
SEED = 11


def calls() -> list[tuple[str, Json]]:
    """Steps of two accumulated calls each, with saves in between and gradients left over at the end."""
    made: list[tuple[str, Json]] = []
    for step in range(NUM_STEPS):
        for part in range(2):
            data = [datum(words(3 * step + part, 20)), datum(words(5 * step + part, 33))]
            if (step, part) == (6, 1):
                # Too large for its row: its payload and its result are files.
                data = [datum(words(i, 60)) for i in range(40)]
            made.append(("forward_backward", {"data": data, "loss_fn": "cross_entropy"}))
        made.append(("optim_step", {"adam_params": {"learning_rate": 5e-3, "weight_decay": 0.01}}))
        if step % 8 == 4:
            made.append(("save_weights_for_sampler", {"name": f"at-{step}"}))
        if step == 10:
            made.append(("save_state", {"name": "middle"}))
    made.append(("forward_backward", {"data": [datum(words(1))], "loss_fn": "cross_entropy"}))
    return made


def finish(run: Run) -> dict[str, dict[str, bytes]]:
    """Use the gradients left over, and look at everything the run has saved."""
    run.do("optim_step", adam_params={"learning_rate": 5e-3})
    run.do("save_state", name="end")
    paths = ["weights/end", "weights/middle", *(f"sampler_weights/at-{step}" for step in (4, 12, 20))]
    return {path: run.files(f"bt://loops:{run.id}/{path}") for path in paths}


def check_results(run: Run, ids: list[str], expected: list[Json]) -> None:
    """Every accepted operation has the result of the undisturbed run, and the steps count one by one."""
    results = [run.result(id) for id in ids]
    steps = [result["metrics"]["step"] for result in results if "step" in result.get("metrics", {})]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert [_without_run(result) for result in results] == [_without_run(result) for result in expected]
    assert run.policy_version() == NUM_STEPS


def _without_run(result: Json) -> Json:
    """A result less the run's id, which is in the paths of checkpoints."""
    return {k: v.split("/")[-2:] if k == "path" else v for k, v in result.items()}


@pytest.fixture(scope="module")
def undisturbed(http: httpx.Client) -> tuple[list[Json], dict[str, dict[str, bytes]]]:
    """Results and files of the same operations on a machine where nothing happens."""
    run = Run.create(http, seed=SEED).attached()
    results = [run.result(id) for id in [run.submit(op, **body) for op, body in calls()]]
    return results, finish(run)


def persistently(run: Run, op: str, body: Json, key: str, seq: int) -> str:
    """Submit as the official client does: the same request again while nobody answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ok(run.post(op, key=key, seq=seq, **body), 202)["operation_id"]
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("num_done", [0, 9, 40])
def test_worker_killed_in_the_middle(
    new_gateway: Callable[[], Gateway], undisturbed: tuple[list[Json], dict[str, dict[str, bytes]]], num_done: int
):
    expected, files = undisturbed
    own = new_gateway()
    run = Run.create(own.http(), seed=SEED).attached()
    ids = [run.submit(op, **body) for op, body in calls()]
    if num_done:
        run.result(ids[num_done - 1])
    killed = own.kill_worker()
    check_results(run, ids, expected)
    assert own.worker_pid() != killed
    assert finish(run) == files


def test_worker_killed_while_it_loads_and_twice_more(
    new_gateway: Callable[[], Gateway], undisturbed: tuple[list[Json], dict[str, dict[str, bytes]]]
):
    expected, files = undisturbed
    own = new_gateway()
    run = Run.create(own.http(), seed=SEED)
    # What loads is the host.
    until(own.hosts, "it loads")[0].kill()
    run.attached()
    ids = [run.submit(op, **body) for op, body in calls()]
    for num_done in (15, 55):
        run.result(ids[num_done])
        own.kill_worker()
    check_results(run, ids, expected)
    assert finish(run) == files


def test_gateway_killed_in_the_middle(
    new_gateway: Callable[[], Gateway], undisturbed: tuple[list[Json], dict[str, dict[str, bytes]]]
):
    expected, files = undisturbed
    own = new_gateway()
    run = Run.create(own.http(), seed=SEED).attached()
    started, restarted = threading.Event(), threading.Event()

    def kill() -> None:
        for pause in (0.25, 1.5):
            started.wait()
            time.sleep(pause)
            own.kill()
            own.start()
        restarted.set()

    killer = threading.Thread(target=kill)
    killer.start()
    ids = []
    for seq, (op, body) in enumerate(calls(), run.seq + 1):
        ids.append(persistently(run, op, body, f"operation-{seq}", seq))
        started.set()
        time.sleep(0.02)
    killer.join()
    assert restarted.is_set()
    run.seq += len(ids)
    check_results(run, ids, expected)
    # A client that asks again, long after, gets the same operation and no second run of it.
    op, body = calls()[2]
    assert persistently(run, op, body, "operation-4", 4) == "operation-4"
    assert run.policy_version() == NUM_STEPS
    assert finish(run) == files
    # And yet again: nothing of it was in memory alone.
    own.kill()
    own.start()
    assert [_without_run(run.result(id)) for id in ids] == [_without_run(result) for result in expected]


def test_terminated_gateway_stops_in_order_and_goes_on(
    new_gateway: Callable[[], Gateway], undisturbed: tuple[list[Json], dict[str, dict[str, bytes]]]
):
    expected, files = undisturbed
    own = new_gateway()
    run = Run.create(own.http(), seed=SEED).attached()
    ids = [run.submit(op, **body) for op, body in calls()]
    run.result(ids[12])
    worker = own.worker_pid()
    poll = threading.Thread(target=_poll_to_its_end, args=(run, ids[-1]))
    poll.start()
    started = time.monotonic()
    assert own.terminate() in STOPPED
    assert time.monotonic() - started < 15, "a loose bound: it must not wait for anything that nobody needs"
    assert is_gone(worker)
    poll.join()
    own.start()
    check_results(run, ids, expected)
    assert finish(run) == files


def _poll_to_its_end(run: Run, id: str) -> None:
    with contextlib.suppress(httpx.TransportError):
        run.http.get(f"{run.path}/operations/{id}")


def test_loaded_state_survives_what_it_was_loaded_from(http: httpx.Client, new_gateway: Callable[[], Gateway]):
    def train(run: Run, disturb: Callable[[], object]) -> list[dict[str, bytes]]:
        run.attached()
        run.train(1, 2)
        path = run.save("start")
        follower = Run.create(run.http, seed=9, path=path).attached()
        follower.train(3)
        run.train(4)
        loaded = run.do("load_state_with_optimizer", path=path)
        assert loaded == {"step": 2}
        run.forward_backward([datum(words(5))])
        # Both have read this checkpoint, which is another one from here on.
        assert run.save("start") == path
        disturb()
        assert run.step()["metrics"]["step"] == 3
        follower.train(6)
        return [run.state("end"), follower.state("end")]

    expected = train(Run.create(http, seed=SEED), lambda: None)
    own = new_gateway()
    assert train(Run.create(own.http(), seed=SEED), own.kill_worker) == expected

    def restart() -> None:
        own.kill()
        own.start()

    assert train(Run.create(own.http(), seed=SEED), restart) == expected


def test_gateway_killed_takes_its_workers_with_it_and_leaves_the_loaded_model(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    run = Run.create(own.http()).attached()
    worker, hosts = own.worker_pid(), own.hosts()
    own.kill()
    until(lambda: is_gone(worker), "the worker has ended", 10)
    own.start()
    run.train(1)
    assert own.worker_pid() != worker
    assert own.hosts() == hosts
    # Whoever stops in order leaves nothing.
    assert own.terminate() in STOPPED
    assert own.hosts() == []


def test_sample_outlives_its_worker(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    run = Run.create(own.http(), seed=1).attached()
    run.train(1)
    run.save("live", "save_weights_for_sampler")
    sampler = f"/loops/samplers/{run.resource['sampler']['id']}"
    request = {"prompt": words(2), "n": 64, "max_tokens": 200, "seed": 1}
    expected = ok(run.http.post(f"{sampler}/sample", json=request))
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(run.http.post(f"{sampler}/sample", json=request)))
    caller.start()
    time.sleep(0.1)
    own.kill_worker()
    caller.join()
    assert ok(answers[0])["choices"] == expected["choices"]
    assert answers[0].headers["x-trainers-policy-version"] == "1"


def test_second_gateway_is_refused(gateway: Gateway):
    arguments = ["serve", "--port", str(stores.free_port()), "--data-dir", str(gateway.data_dir)]
    second = subprocess.run(
        [sys.executable, "-m", "selfloop.cli.main", *arguments],
        env=environment(SELFLOOP_API_KEY=KEY),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    said = " ".join(second.stderr.split())
    assert f"another selfloop server (pid {gateway.pid})" in said
    assert "--data-dir" in said
    assert "Traceback" not in said


def test_port_in_use_is_reported(gateway: Gateway, data_template: Path, tmp_path: Path):
    data_dir = copy_data(data_template, tmp_path / "data")
    arguments = ["serve", "--port", str(gateway.port), "--data-dir", str(data_dir)]
    second = subprocess.run(
        [sys.executable, "-m", "selfloop.cli.main", *arguments],
        env=environment(SELFLOOP_API_KEY=KEY, **stores.environment(data_dir)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode != 0
    assert str(gateway.port) in second.stderr
    assert "is taken by another program" in second.stderr
    assert "Traceback" not in second.stderr
    assert "export" not in second.stdout


def test_what_a_crash_left_half_written_vanishes(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    run = Run.create(own.http(), seed=1).attached()
    run.train(1)
    path = run.save("whole")
    files = run.files(path)
    own.kill()
    stored = stores.checkpoints(own.data_dir)

    def listed() -> set[str]:
        return {path.relative_to(stored).parts[0] for path in stored.rglob("*") if path.is_file()}

    whole = listed()
    days_ago = time.time() - 3 * 86400
    for left in ("aaaaaaa.part", "bbbbbbb"):
        (stored / left).mkdir()
        half = stored / left / "adapter_model.safetensors"
        half.write_bytes(b"half")
        # In a bucket another process might be writing what is young.
        os.utime(half, (days_ago, days_ago))
    assert len(listed()) == len(whole) + 2
    own.start()
    assert listed() == whole
    assert run.files(path) == files
    assert [c["checkpoint_id"] for c in ok(run.http.get(f"/v1/loops/checkpoints?run_id={run.id}"))["checkpoints"]] == [
        "whole"
    ]


def test_a_refused_place_is_not_waited_for_after_a_restart(new_gateway: Callable[[], Gateway]):
    """The client has counted its sequence id, and never sends it again; a gap ends what waits behind it."""
    own = new_gateway()
    run = Run.create(own.http()).attached()
    loss = {"data": [datum(words(1))], "loss_fn": "cross_entropy"}
    assert run.post("forward", **(loss | {"loss_fn": "none such"})).status_code == 422
    refused_ahead = run.seq + 2
    assert run.post("forward", **(loss | {"loss_fn": "none such"}), seq=refused_ahead).status_code == 422
    own.kill()
    own.start()
    first = run.submit("forward", **loss)
    last = run.submit("forward", **loss, seq=refused_ahead + 1)
    assert run.result(last)["metrics"] == run.result(first)["metrics"]


def test_everything_that_was_made_is_there_after_a_restart(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    http = own.http()
    key = selfloop("keys", "create", "another", "--data-dir", str(own.data_dir)).split()[-1]
    run = Run.create(http, seed=1, max_seq_len=64, name="mine", scale_down_delay_seconds=1234).attached()
    run.train(1)
    live = run.save("live", "save_weights_for_sampler")
    body = {"session_id": run.resource["session_id"], "model_path": live}
    standalone = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
    ended = Run.create(http)
    ok(http.post(f"/v1/loops/runs/{ended.id}/deactivate"))
    request = {"prompt": words(2), "max_tokens": 5, "temperature": 0}
    urls = [f"/loops/samplers/{id}/sample" for id in (run.resource["sampler"]["id"], standalone["id"])]
    before = [ok(http.post(url, json=request))["choices"] for url in urls]
    seen = ok(http.get(f"/v1/loops/runs/{run.id}"))["run"]

    own.kill()
    own.start()
    after = ok(http.get(f"/v1/loops/runs/{run.id}"))["run"]
    assert {k: v for k, v in after.items() if k != "sampler"} == {k: v for k, v in seen.items() if k != "sampler"}
    assert ok(http.get(f"/v1/loops/runs/{ended.id}"))["run"]["status"]["name"] == "INACTIVE"
    deployment = ok(http.get(f"/v1/loops/deployments/{run.resource['deployment_id']}"))["deployment"]
    assert deployment["scale_down_delay_seconds"] == 1234
    assert deployment["status"]["name"] == "SCALED_TO_ZERO"
    assert [ok(http.post(url, json=request))["choices"] for url in urls] == before
    assert own.http(key).get("/v1/teams").status_code == 200
    run.train(2)
    assert run.policy_version() == 2
