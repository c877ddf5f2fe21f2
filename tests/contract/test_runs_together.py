"""Many runs of one base model at once: each learns what it would learn by itself."""

from collections.abc import Callable

import httpx
import pytest

from gateway import Gateway, Json, Run, datum, words

NUM_STEPS = 3
RANKS = (8, 2, 16, 4)


def submit_all(run: Run, place: int) -> list[str]:
    """Steps of different lengths, accepted without waiting for any."""
    ids: list[str] = []
    for step in range(NUM_STEPS):
        data = [datum(words(5 * place + step + i, 8 + 7 * place + 3 * i)) for i in range(1 + place % 3)]
        ids.append(run.submit("forward_backward", data=data, loss_fn="cross_entropy"))
        ids.append(run.submit("optim_step", adam_params={"learning_rate": 1e-3 * (1 + place)}))
    return ids


def start(http: httpx.Client, place: int) -> Run:
    return Run.create(http, seed=place, lora_rank=RANKS[place % len(RANKS)]).attached()


def numbers(results: list[Json]) -> list[float]:
    """Losses and gradient norms."""
    return [value for result in results for name, value in result["metrics"].items() if name in ("loss", "grad_norm")]


def test_eight_runs_at_once_learn_what_each_learns_alone(http: httpx.Client):
    runs = [start(http, place) for place in range(8)]
    lost = start(http, 99)
    asked = [submit_all(run, place) for place, run in enumerate(runs[:4])]
    # A neighbour that blows itself up: the largest rate that is accepted.
    before = lost.submit("forward_backward", data=[datum(words(1))], loss_fn="cross_entropy")
    for _ in range(2):
        lost.submit("optim_step", adam_params={"learning_rate": 9e8, "grad_clip_norm": 0.0})
        lost.submit("forward_backward", data=[datum(words(1))], loss_fn="cross_entropy")
    blown = lost.submit("forward_backward", data=[datum(words(1))], loss_fn="cross_entropy")
    asked += [submit_all(run, place) for place, run in enumerate(runs[4:], 4)]
    together = [[run.result(id) for id in ids] for run, ids in zip(runs, asked, strict=True)]
    outcome = lost.outcome(blown)
    first_loss = lost.result(before)["metrics"]["loss"]
    assert outcome["status"] == "failed" or abs(outcome["result"]["metrics"]["loss"] - first_loss) > 1
    for place, results in enumerate(together):
        alone = start(http, place)
        expected = [alone.result(id) for id in submit_all(alone, place)]
        assert numbers(results) == pytest.approx(numbers(expected), rel=1e-4)
        assert results[-1]["metrics"]["step"] == NUM_STEPS


def test_deterministic_weights_are_the_same_bits_with_and_without_neighbours(
    new_gateway: Callable[..., Gateway],
):
    """Under --deterministic, also when the worker dies in the middle and everything is replayed."""
    own = new_gateway("--deterministic")
    http = own.http()
    alone = [start(http, place) for place in range(3)]
    for place, run in enumerate(alone):
        for id in submit_all(run, place):
            run.result(id)
    together = [start(http, place) for place in range(3)]
    asked = [submit_all(run, place) for place, run in enumerate(together)]
    together[0].result(asked[0][1])
    own.kill_worker()
    for run, ids in zip(together, asked, strict=True):
        for id in ids:
            run.result(id)
    for one, other in zip(alone, together, strict=True):
        assert one.state() == other.state()
