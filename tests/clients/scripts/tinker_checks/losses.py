"""Policy losses against their formulas, written out in numpy."""

import numpy as np
from shared import ADAM, STILL, datum, ids, logprobs, sampled, step, trainer

RNG = np.random.default_rng(0)
TOKENS = ids(5)
N = 15


def _inputs(lp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = lp + RNG.normal(0, 0.3, N)
    advantages = RNG.normal(0, 1, N)
    advantages[:4] = 0
    return q.astype(np.float32), advantages.astype(np.float32)


def _check(loss_fn: str, config: dict[str, float] | None, formula) -> None:
    client = trainer()
    lp = logprobs(client, TOKENS).astype(np.float64)
    q, a = _inputs(lp)
    result = client.forward_backward([datum(TOKENS, logprobs=q, advantages=a)], loss_fn, config).result()
    expected = formula(lp, q.astype(np.float64), a.astype(np.float64)).sum()
    assert np.isclose(result.metrics["loss:sum"], expected, rtol=1e-3), (loss_fn, result.metrics, expected)
    assert client.optim_step(STILL).result().metrics["grad_norm"] > 0


def check_importance_sampling() -> None:
    _check("importance_sampling", None, lambda lp, q, a: -np.exp(lp - q) * a)


def check_ppo() -> None:
    def formula(lp, q, a):
        ratio = np.exp(lp - q)
        return -np.minimum(ratio * a, np.clip(ratio, 0.9, 1.1) * a)

    _check("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, formula)


def check_cispo_and_its_own_defaults() -> None:
    _check("cispo", None, lambda lp, q, a: -np.clip(np.exp(lp - q), 0.0, 4.0) * lp * a)


def check_dro() -> None:
    _check("dro", {"beta": 0.1}, lambda lp, q, a: -(lp * a - 0.05 * (lp - q) ** 2))


def check_gspo() -> None:
    def formula(lp, q, a):
        ratio = np.exp((lp - q)[a != 0].mean())
        return -np.minimum(ratio * a, np.clip(ratio, 1 - 3e-4, 1 + 4e-4) * a)

    _check("gspo", None, formula)


def check_stable_reinforce_stand_in() -> None:
    def formula(lp, q, a):
        return -min(np.exp((lp - q)[a != 0].sum()), 2.0) * lp * a

    _check("stable_reinforce", None, formula)


def check_a_policy_gradient_step_on_fresh_samples() -> None:
    """Sampled by the weights being trained the ratio is 1, and what was rewarded grows likelier."""
    client = trainer()
    for _ in range(2):
        step(client, datum(ids(1)))
    sampler = client.save_weights_and_get_sampling_client().result()
    q = sampled(sampler, TOKENS)
    data = datum(TOKENS, logprobs=q, advantages=np.ones(N))
    result = client.forward_backward([data], "importance_sampling").result()
    assert np.isclose(result.metrics["loss:sum"], -N, rtol=1e-3), result.metrics
    client.optim_step(ADAM).result()
    assert logprobs(client, TOKENS).sum() > q.sum()
