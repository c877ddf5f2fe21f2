"""A worker that hangs, stands still, loses its device, runs out of memory or is killed by an operation."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stores
from gateway import KEY, REPO, Gateway, Json, Run, copy_data, datum, until, words

FAULTS = REPO / "tests" / "faults"
HANGS_ONCE, DEVICE_FAILS_ONCE, HALF_CHANGES, KILLS = 0.00501, 0.00502, 0.00503, 0.00504


@pytest.fixture
def faulty(data_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """A gateway with short limits whose workers can be made to go wrong."""
    (tmp_path / "done").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    monkeypatch.setenv("FAULTS_DONE", str(tmp_path / "done"))
    own = Gateway(copy_data(data_template, tmp_path / "data"))
    yield own.start(KEY, "--operation-timeout", "2", "--heartbeat-timeout", "4", "--snapshot-every", "0")
    own.close()


def step(run: Run, learning_rate: float, seed: int) -> Json:
    run.forward_backward([datum(words(seed))])
    return run.outcome(run.submit("optim_step", adam_params={"learning_rate": learning_rate}), 120)


def test_a_worker_that_goes_wrong_is_replaced_and_its_runs_lose_nothing(faulty: Gateway):
    http = faulty.http()
    run, beside = Run.create(http, seed=3).attached(), Run.create(http, seed=4).attached()
    before: Callable[[], int] = faulty.worker_pid
    beside.train(1)

    def replaced(by: Callable[[], object]) -> None:
        old = before()
        by()
        assert until(faulty.worker_pids, "a worker lives") != [old]

    assert step(run, 0.01, 1)["status"] == "done"
    replaced(lambda: step(run, HANGS_ONCE, 2))
    assert "hung" in faulty.log
    replaced(lambda: step(run, DEVICE_FAILS_ONCE, 3))
    assert "illegal memory access" in faulty.log

    stopped = faulty.worker_pid()
    os.kill(stopped, signal.SIGSTOP)
    assert step(run, 0.01, 4)["status"] == "done"
    assert faulty.worker_pid() != stopped
    assert "no heartbeat" in faulty.log

    # What went wrong half-way is undone, with what was sent behind it, and the worker lives on.
    alive = faulty.worker_pid()
    failing = run.submit("optim_step", adam_params={"learning_rate": HALF_CHANGES})
    behind = run.submit("forward_backward", data=[datum(words(5))], loss_fn="cross_entropy")
    assert run.outcome(failing)["error_class"] == "MemoryError"
    run.result(behind)
    assert faulty.worker_pid() == alive

    # The one to blame fails; the run beside it, whose operations its deaths took down, does not notice.
    ids = [beside.submit("forward_backward", data=[datum(words(i))], loss_fn="cross_entropy") for i in range(4)]
    killing = run.submit("optim_step", adam_params={"learning_rate": KILLS})
    ids += [beside.submit("optim_step", adam_params={"learning_rate": 0.01}) for _ in range(2)]
    killed = run.outcome(killing, 120)
    assert killed["error_class"] == "WorkerLost"
    assert "ended its worker 2 times" in killed["error"]
    assert all(beside.outcome(id, 120)["status"] == "done" for id in ids)

    undisturbed = Run.create(http, seed=3).attached()
    for learning_rate, seed in ((0.01, 1), (HANGS_ONCE, 2), (DEVICE_FAILS_ONCE, 3), (0.01, 4)):
        step(undisturbed, learning_rate, seed)
    undisturbed.forward_backward([datum(words(5))])
    assert [r.step()["metrics"]["step"] for r in (run, undisturbed)] == [5, 5]
    assert run.state() == undisturbed.state()


def test_what_killed_a_worker_is_remembered_by_the_next_gateway(faulty: Gateway):
    """Else whatever ends both would be tried for ever."""
    run = Run.create(faulty.http(), seed=3).attached()
    run.train(1)
    killing = run.submit("optim_step", adam_params={"learning_rate": KILLS})
    attempts = f"SELECT num_attempts FROM operations WHERE id = '{killing}'"
    until(lambda: stores.execute(faulty.data_dir, attempts) == [(1,)], "the first death is stored")
    faulty.kill()
    num_deaths = faulty.log.count("lost its worker")
    faulty.start()
    killed = run.outcome(killing, 120)
    assert killed["error_class"] == "WorkerLost"
    assert "ended its worker 2 times" in killed["error"]
    assert faulty.log.count("lost its worker") == num_deaths + 1
    assert run.step()["metrics"]["step"] == 2
