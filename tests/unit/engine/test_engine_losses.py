"""Each loss against its formula written out in float64, token by token, with the gradient by differences."""

import math
from collections.abc import Callable

import pytest
import torch

from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.registry import LOSS_FUNCTIONS, METRICS_FUNCTIONS
from selfloop.types.losses import LOSSES

Formula = Callable[[float, float, float, dict[str, float | bool]], float]


def _importance_sampling(lp: float, q: float, a: float, _config: dict[str, float | bool]) -> float:
    return -math.exp(lp - q) * a


def _ppo(lp: float, q: float, a: float, config: dict[str, float | bool]) -> float:
    ratio = math.exp(lp - q)
    clipped = min(max(ratio, config["clip_low_threshold"]), config["clip_high_threshold"])
    return -min(ratio * a, clipped * a)


def _dro(lp: float, q: float, a: float, config: dict[str, float | bool]) -> float:
    return -(lp * a - config["beta"] / 2 * (lp - q) ** 2)


def _dppo(lp: float, q: float, a: float, config: dict[str, float | bool]) -> float:
    moved = math.exp(lp) - math.exp(q)
    dropped = moved > config["dppo_mask_high"] if a > 0 else moved < -config["dppo_mask_low"]
    gain = 0.0 if dropped else config["adv_tau"] * a * math.exp(lp - q)
    return -gain + config["kl_tau"] * (lp - q) ** 2


FORMULAS: dict[str, Formula] = {
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "dro": _dro,
    "dppo": _dppo,
}
CONFIGS: dict[str, list[dict[str, float | bool]]] = {
    "importance_sampling": [{}],
    "ppo": [LOSSES["ppo"].config, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}],
    "dro": [LOSSES["dro"].config, {"beta": 0.7}],
    "dppo": [
        LOSSES["dppo"].config,
        {"dppo_mask_high": 0.02, "dppo_mask_low": 0.01, "adv_tau": 0.6, "kl_tau": 0.3},
        {"dppo_mask_high": 0.01, "dppo_mask_low": 0.02, "adv_tau": 1.0, "kl_tau": 0.0},
    ],
}
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


def _batch(lp_T: torch.Tensor, q: list[float], a: list[float], config: dict[str, float | bool]) -> LossInputs:
    active_T = torch.ones(len(q), dtype=torch.bool)
    active_T[-1] = False
    inputs = {"weights": torch.ones(len(q)), "logprobs": torch.tensor(q), "advantages": torch.tensor(a)}
    return LossInputs(lp_T, active_T, inputs, [len(q)], config)


def _random_tokens() -> tuple[list[float], list[float], list[float]]:
    generator = torch.Generator().manual_seed(5)
    lp, shift, a = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(3))
    return (-lp.abs()).tolist(), (-lp.abs() + 0.4 * shift).tolist(), a.tolist()


@pytest.mark.parametrize(("name", "config"), CASES)
def test_value_and_gradient(name: str, config: dict[str, float | bool]) -> None:
    lp, q, a = _random_tokens()
    lp_T = torch.tensor(lp, requires_grad=True)
    loss_T = LOSS_FUNCTIONS[name](_batch(lp_T, q, a, config))
    (grad_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
    loss_T = loss_T.detach()
    formula, h = FORMULAS[name], 1e-6
    for i in range(len(lp) - 1):
        assert float(loss_T[i]) == pytest.approx(formula(lp[i], q[i], a[i], config), rel=1e-4, abs=1e-5)
        slope = (formula(lp[i] + h, q[i], a[i], config) - formula(lp[i] - h, q[i], a[i], config)) / (2 * h)
        assert float(grad_T[i]) == pytest.approx(slope, rel=1e-3, abs=1e-4)
    assert (float(loss_T[-1]), float(grad_T[-1])) == (0.0, 0.0)


def test_cispo_scales_the_gradient_by_a_clipped_ratio_that_has_none_itself() -> None:
    config: dict[str, float | bool] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    lp, q, a = _random_tokens()
    lp_T = torch.tensor(lp, requires_grad=True)
    loss_T = LOSS_FUNCTIONS["cispo"](_batch(lp_T, q, a, config))
    (grad_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
    loss_T = loss_T.detach()
    for i in range(len(lp) - 1):
        weight = min(max(math.exp(lp[i] - q[i]), 0.8), 1.2)
        assert float(loss_T[i]) == pytest.approx(-weight * lp[i] * a[i], rel=1e-4, abs=1e-5)
        assert float(grad_T[i]) == pytest.approx(-weight * a[i], rel=1e-4, abs=1e-5)
    assert (float(loss_T[-1]), float(grad_T[-1])) == (0.0, 0.0)


def test_dppo_drops_a_token_only_in_the_direction_that_its_advantage_asks_for() -> None:
    """Two tokens that moved by 0.5, up and down, each with an advantage of either sign and of none."""
    low, high = math.log(0.25), math.log(0.75)
    lp, q = [high] * 3 + [low] * 3 + [-1.0], [low] * 3 + [high] * 3 + [-1.0]
    config = LOSSES["dppo"].config | {"kl_tau": 0.0}
    lp_T = torch.tensor(lp, requires_grad=True)
    loss_T = LOSS_FUNCTIONS["dppo"](_batch(lp_T, q, [1.0, -1.0, 0.0, 1.0, -1.0, 0.0, 1.0], config))
    (grad_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
    assert (grad_T != 0).tolist() == [False, True, False, True, False, False, False]


Row = tuple[list[float], list[float], list[float]]


def _dpo_delta(chosen: Row, rejected: Row, beta: float) -> float:
    rows = [sum(w * (lp - ref) for lp, ref, w in zip(*row, strict=True)) for row in (chosen, rejected)]
    return beta * (rows[0] - rows[1])


def _dpo(chosen: Row, rejected: Row, config: dict[str, float | bool]) -> float:
    delta, smoothing = _dpo_delta(chosen, rejected, config["beta"]), config["label_smoothing"]
    return (1 - smoothing) * math.log1p(math.exp(-delta)) + smoothing * math.log1p(math.exp(delta))


def _pairs(lengths: list[int]) -> list[Row]:
    """Rows of logprobs, reference logprobs and weights; every third weight is zero."""
    lp, ref, _ = _random_tokens()
    rows: list[Row] = []
    for start, length in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True):
        at = slice(start, start + length)
        rows.append((lp[at], ref[at], [0.5 * (i % 3) for i in range(length)]))
    return rows


def _pair_batch(rows: list[Row], config: dict[str, float | bool]) -> tuple[torch.Tensor, LossInputs]:
    lp_T, ref_T, weights_T = (torch.tensor([x for row in rows for x in row[part]]) for part in range(3))
    lp_T.requires_grad_()
    inputs = {"weights": weights_T, "ref_logprobs": ref_T}
    active_T = torch.ones(lp_T.shape[0], dtype=torch.bool)
    return lp_T, LossInputs(lp_T, active_T, inputs, [len(row[0]) for row in rows], config)


@pytest.mark.parametrize("config", [LOSSES["dpo"].config, {"beta": 0.7, "label_smoothing": 0.2}])
def test_dpo_value_gradient_and_metrics(config: dict[str, float | bool]) -> None:
    rows = _pairs([5, 9, 1, 3, 12, 7])
    lp_T, batch = _pair_batch(rows, config)
    loss_G = LOSS_FUNCTIONS["dpo"](batch)
    (grad_T,) = torch.autograd.grad(loss_G.sum(), lp_T)
    # The third and fourth row: one token of weight zero, and three.
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    deltas = [_dpo_delta(chosen, rejected, config["beta"]) for chosen, rejected in pairs]
    assert loss_G.tolist() == pytest.approx([_dpo(*pair, config) for pair in pairs], rel=1e-4)
    h, at = 1e-6, 0
    for index, row in enumerate(rows):
        for i in range(len(row[0])):
            values = []
            for step in (h, -h):
                moved = [*row[0][:i], row[0][i] + step, *row[0][i + 1 :]]
                pair = list(pairs[index // 2])
                pair[index % 2] = (moved, *row[1:])
                values.append(_dpo(pair[0], pair[1], config))
            assert float(grad_T[at]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-3, abs=1e-5)
            at += 1
    metrics = METRICS_FUNCTIONS["dpo"](batch)
    assert float(metrics["accuracy"]) == sum(delta > 0 for delta in deltas)
    assert float(metrics["margin"]) == pytest.approx(sum(deltas), rel=1e-4)


def test_dpo_of_the_reference_itself_is_log_two_and_without_trained_tokens_nothing() -> None:
    rows = _pairs([4, 4, 3, 3])
    rows = [(lp, lp, [1.0] * len(lp)) for lp, _, _ in rows[:2]] + [(lp, ref, [0.0] * 3) for lp, ref, _ in rows[2:]]
    lp_T, batch = _pair_batch(rows, LOSSES["dpo"].config)
    loss_G = LOSS_FUNCTIONS["dpo"](batch)
    (grad_T,) = torch.autograd.grad(loss_G.sum(), lp_T)
    assert loss_G.tolist() == pytest.approx([math.log(2), 0.0])
    assert grad_T.tolist() == pytest.approx([-0.05] * 4 + [0.05] * 4 + [0.0] * 6)


def test_on_policy_all_policy_losses_have_the_policy_gradient() -> None:
    lp, _, a = _random_tokens()
    for name in ("importance_sampling", "ppo", "cispo", "dro", "dppo"):
        lp_T = torch.tensor(lp, requires_grad=True)
        loss_T = LOSS_FUNCTIONS[name](_batch(lp_T, lp, a, LOSSES[name].config))
        (grad_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
        assert torch.allclose(grad_T[:-1], -torch.tensor(a)[:-1], atol=1e-5), name


def test_every_declared_loss_is_there_and_only_those() -> None:
    assert LOSS_FUNCTIONS.keys() == LOSSES.keys()


def test_the_gap_between_sampler_and_trainer_counts_sampled_tokens():
    """Two tokens of a prompt, two sampled ones, one masked; five of one sequence, four of them trained."""
    logprobs, old = torch.tensor([-3.0, -2.0, -1.0, -0.5, -9.0]), torch.tensor([0.0, 0.0, -1.25, -0.25, 0.0])
    inputs = {"logprobs": old, "advantages": torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]), "weights": torch.ones(5)}
    active = torch.tensor([True, True, True, True, False])
    batch = LossInputs(logprobs, active, inputs, [5], {})
    assert float(METRICS_FUNCTIONS["ppo"](batch)["sampler_logprob_gap"]) / 4 == pytest.approx(0.25)
