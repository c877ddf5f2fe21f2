"""``scale_down_delay_seconds``: the memory is really given back, and nobody notices more than the wait."""

import time
from collections.abc import Callable

import httpx
import pytest

from gateway import Gateway, Run, datum, is_gone, ok, until, words


def status_of(http: httpx.Client, run: Run) -> str:
    return ok(http.get(f"/v1/loops/deployments/{run.resource['deployment_id']}"))["deployment"]["status"]["name"]


def sampler_status(http: httpx.Client, run: Run) -> str:
    return ok(http.get(f"/v1/loops/samplers/{run.resource['sampler']['id']}"))["sampler"]["status"]["name"]


def begin(run: Run) -> None:
    """Two steps, and gradients that wait for the next."""
    run.attached()
    run.train(1, 2)
    run.forward_backward([datum(words(3))])


def finish(run: Run) -> dict[str, bytes]:
    run.forward_backward([datum(words(4)), datum(words(5, 20))])
    assert run.step()["metrics"]["step"] == 3
    return run.state()


@pytest.fixture
def own(new_gateway: Callable[[], Gateway]) -> Gateway:
    return new_gateway()


def test_idle_run_gives_its_worker_back_and_comes_back_the_same(own: Gateway, http: httpx.Client):
    undisturbed = Run.create(http, seed=5)
    begin(undisturbed)
    expected = finish(undisturbed)

    client = own.http()
    run = Run.create(client, seed=5, scale_down_delay_seconds=1)
    begin(run)
    assert status_of(client, run) == "RUNNING"
    worker = own.worker_pid()
    until(lambda: status_of(client, run) == "SCALED_TO_ZERO", "the deployment sleeps")
    until(lambda: is_gone(worker), "its worker has ended")
    assert own.worker_pids() == []
    assert sampler_status(client, run) == "SCALED_TO_ZERO"
    assert run.policy_version() == 2

    assert finish(run) == expected
    assert own.worker_pid() != worker
    assert status_of(client, run) == "RUNNING"
    assert sampler_status(client, run) == "ACTIVE"

    # The sampler sleeps with its run; a sample wakes it and gets the weights that were published.
    run.save("published", "save_weights_for_sampler")
    sampler = f"/loops/samplers/{run.resource['sampler']['id']}"
    request = {"prompt": words(6), "max_tokens": 4, "temperature": 0}
    before = client.post(f"{sampler}/sample", json=request)
    until(lambda: sampler_status(client, run) == "SCALED_TO_ZERO", "the sampler sleeps")
    until(lambda: not own.worker_pids(), "the worker has ended")
    woken = client.post(f"{sampler}/sample", json=request)
    assert ok(woken)["choices"] == ok(before)["choices"]
    assert woken.headers["x-trainers-policy-version"] == "3"

    until(lambda: sampler_status(client, run) == "SCALED_TO_ZERO", "the sampler sleeps again")
    ok(client.post(f"{sampler}/wake"), 202)
    until(lambda: sampler_status(client, run) == "ACTIVE", "the sampler is awake")

    # The Loops client asks for the readiness just before it samples; whoever else looks lets the sampler sleep.
    until(lambda: sampler_status(client, run) == "SCALED_TO_ZERO", "the sampler sleeps once more")
    named = run.resource["sampler"]
    readiness = f"/v1/models/{named['model_id']}/deployments/{named['deployment_id']}"
    assert ok(client.get(readiness))["status"] == "SCALED_TO_ZERO"
    asked = client.get(readiness, headers={"User-Agent": "baseten-loops/0.32.0"})
    assert ok(asked)["status"] == "ACTIVE"


def test_gradients_outlive_a_sample_that_wakes_the_worker(own: Gateway, http: httpx.Client):
    """Gradients wait asleep; meanwhile the live adapter is sampled, which brings the worker back for it alone."""
    undisturbed = Run.create(http, seed=5)
    begin(undisturbed)
    expected = finish(undisturbed)

    client = own.http()
    run = Run.create(client, seed=5, scale_down_delay_seconds=1)
    begin(run)
    run.save("published", "save_weights_for_sampler")
    sampler = f"/loops/samplers/{run.resource['sampler']['id']}"
    request = {"prompt": words(6), "max_tokens": 4, "temperature": 0}
    awake = ok(client.post(f"{sampler}/sample", json=request))["choices"]
    worker = own.worker_pid()
    until(lambda: is_gone(worker), "the worker has ended")
    assert ok(client.post(f"{sampler}/sample", json=request))["choices"] == awake
    assert own.worker_pid() != worker
    assert finish(run) == expected


def test_keepalive_keeps_the_worker(own: Gateway):
    client = own.http()
    run = Run.create(client, scale_down_delay_seconds=1).attached()
    worker = own.worker_pid()
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        ok(client.get(f"{run.path}/health"))
        time.sleep(0.1)
    assert own.worker_pids() == [worker]
    assert status_of(client, run) == "RUNNING"
