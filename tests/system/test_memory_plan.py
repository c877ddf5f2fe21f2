"""More runs than fit the memory: they take turns, and nobody dies."""

from collections.abc import Callable
from pathlib import Path

import psutil

from gateway import MODEL, Gateway, Run, datum, new_session, until, words

# The tiny model at rank 64 takes 2.6 MB a run, and as much once more beside them: two fit a quarter of this.
MEMORY = "36MiB"
RANK, NUM_RUNS, NUM_STEPS = 64, 6, 3


def adjustment(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_runs_that_do_not_fit_at_a_time_take_turns(new_gateway: Callable[..., Gateway]):
    gateway = new_gateway("--memory", MEMORY, "--deterministic")
    http = gateway.http()
    runs = [Run.create(http, lora_rank=RANK, seed=7) for _ in range(NUM_RUNS)]
    before, submitted = None, []
    for _ in range(NUM_STEPS):
        for seed, run in enumerate(runs):
            tokens = words(seed)
            submitted.append((run, run.submit("forward_backward", data=[datum(tokens)], loss_fn="cross_entropy")))
            submitted.append((run, run.submit("optim_step", adam_params={"learning_rate": 1e-2})))
    for run, operation_id in submitted:
        run.result(operation_id, timeout=120)
        before = before or gateway.worker_pid()
    assert gateway.worker_pid() == before, "no worker died"
    assert "waiting for memory" in gateway.log
    # What came back from a snapshot is what it was: all runs that saw the same data have the same weights.
    alone = new_gateway("--deterministic")
    twin = Run.create(alone.http(), lora_rank=RANK, seed=7)
    for _ in range(NUM_STEPS):
        twin.forward_backward([datum(words(3))])
        twin.step()
    assert runs[3].logprobs() == twin.logprobs()


def test_a_rank_that_never_fits_is_refused_with_the_one_that_does(new_gateway: Callable[..., Gateway]):
    gateway = new_gateway("--memory", MEMORY)
    http = gateway.http()
    run = Run.create(http, lora_rank=8)
    run.train(1)
    body = {"session_id": new_session(http), "base_model": MODEL, "lora_rank": 256}
    refused = http.post("/v1/loops/runs", json=body)
    assert refused.status_code in (400, 422)
    assert "lora_rank: at most" in refused.text


def test_the_gateway_is_the_last_that_the_kernel_ends(new_gateway: Callable[..., Gateway]):
    gateway = new_gateway()
    Run.create(gateway.http(), lora_rank=4).train(1)
    host = until(lambda: gateway.hosts(), "a fork server")[0]
    assert adjustment(gateway.worker_pid()) >= adjustment(host.pid) > adjustment(gateway.pid)
    assert psutil.pid_exists(gateway.pid)
