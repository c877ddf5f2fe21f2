"""Each loss against its formula written out in float64, token by token, with the gradient by differences."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.registry import LOSS_FUNCTIONS, METRICS_FUNCTIONS
from selfloop.types.datum import Datum, Tensor
from selfloop.types.losses import LOSSES
from selfloop.types.operation import AdamParams

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


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError, match="active"):
        LossInputs(torch.zeros(3), torch.ones(2, dtype=torch.bool), {"weights": torch.ones(3)}, [3], {})
    batch = LossInputs(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), {"weights": torch.ones(3, 2)}, [3], {})
    assert LOSS_FUNCTIONS["cross_entropy"](batch).shape == (3,)


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
    metrics = {name: float(total) / 4 for name, total in METRICS_FUNCTIONS["ppo"](batch).items()}
    assert metrics == pytest.approx({"sampler_logprob_gap": 0.25, "kl_sampler_trainer": 0.0, "advantage_mean": 0.5})


def test_the_divergence_is_of_the_sampler_from_the_trainer():
    """The mean of ln(q / p) over what q sampled is above 0 where p finds it less likely."""
    inputs = {"logprobs": torch.tensor([-1.0, -0.5]), "advantages": torch.tensor([1.0, -2.0]), "weights": torch.ones(2)}
    batch = LossInputs(torch.tensor([-1.5, -0.75]), torch.tensor([True, True]), inputs, [2], {})
    metrics = {name: float(total) / 2 for name, total in METRICS_FUNCTIONS["dro"](batch).items()}
    assert metrics == pytest.approx({"sampler_logprob_gap": 0.375, "kl_sampler_trainer": 0.375, "advantage_mean": -0.5})


# Log ratios beyond what float32 can raise e to, on either side, and beside the thresholds.
DRIFTS = [200.0, -200.0, 90.0, -90.0, 0.1, -0.1, 0.3, -0.4, 0.0]
FACTORS = [1.0, -2.0, 0.0]
POLICY = {
    "importance_sampling": [{}],
    "ppo": [LOSSES["ppo"].config, {"clip_low_threshold": 0.0, "clip_high_threshold": 5.0}],
    "cispo": [LOSSES["cispo"].config, {"clip_low_threshold": 0.5, "clip_high_threshold": 1e38}],
    "dro": [LOSSES["dro"].config, {"beta": 0.0}],
    "gspo": [LOSSES["gspo"].config, {"clip_low_threshold": 0.2, "clip_high_threshold": 0.3}],
    "stable_reinforce": [LOSSES["stable_reinforce"].config, {"ratio_cap": 1e38, "kl_coeff": 0.5}],
    "dppo": [LOSSES["dppo"].config, {**LOSSES["dppo"].config, "adv_tau": 0.0, "kl_tau": 0.0}],
}


def _exact(name: str, lp: float, q: float, a: float, config: dict[str, float | bool]) -> tuple[float, float]:
    """Loss and slope of a sequence of one token in float64, branch by branch; 0 times anything is 0."""
    drift, ratio = lp - q, math.exp(lp - q)
    low, high = (float(config.get(f"clip_{side}_threshold", 0.0)) for side in ("low", "high"))
    match name:
        case "importance_sampling":
            return -ratio * a, -ratio * a
        case "ppo" | "gspo":
            if name == "gspo":
                low, high = 1 - low, 1 + high
            bound = high if a > 0 and ratio > high else low if a < 0 and ratio < low else None
            return (-ratio * a, -ratio * a) if bound is None else (-bound * a, 0.0)
        case "cispo":
            weight = min(max(ratio, low), high)
            return -weight * lp * a, -weight * a
        case "dro":
            return config["beta"] / 2 * drift**2 - lp * a, config["beta"] * drift - a
        case "stable_reinforce":
            # A sequence without an advantage has no token that counts.
            weight, kl = (min(ratio, config["ratio_cap"]), config["kl_coeff"]) if a != 0 else (1.0, 0.0)
            return kl / 2 * drift**2 - weight * lp * a, kl * drift - weight * a
        case _:
            moved = math.exp(lp) - math.exp(q)
            dropped = moved > config["dppo_mask_high"] if a > 0 else moved < -config["dppo_mask_low"]
            gain = 0.0 if dropped else config["adv_tau"] * a * ratio
            return config["kl_tau"] * drift**2 - gain, 2 * config["kl_tau"] * drift - gain


@pytest.mark.parametrize(("name", "config"), [(name, config) for name, configs in POLICY.items() for config in configs])
def test_policy_losses_answer_wherever_float32_holds_the_answer(name: str, config: dict[str, float | bool]) -> None:
    """Clipped branches, advantages of 0 and masked targets at any ratio; what overflows is not answered by a number."""
    num_answers = 0
    for drift, a in itertools.product(DRIFTS, FACTORS):
        lp_T = torch.tensor([-1.0], requires_grad=True)
        inputs = {name: torch.tensor([value]) for name, value in (("logprobs", -1.0 - drift), ("advantages", a))}
        inputs["weights"] = torch.ones(1)
        q = float(inputs["logprobs"][0])
        loss_T = LOSS_FUNCTIONS[name](LossInputs(lp_T, torch.ones(1, dtype=torch.bool), inputs, [1], config))
        (slope_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
        loss, slope = _exact(name, -1.0, q, a, config)
        for found, expected in ((float(loss_T.detach()), loss), (float(slope_T), slope)):
            if abs(expected) < torch.finfo(torch.float32).max:
                assert found == pytest.approx(expected, rel=2e-5, abs=1e-30), (drift, a)
                num_answers += 1
            else:
                assert math.isinf(found), (drift, a)
    assert num_answers >= 2 * len(DRIFTS)


@pytest.mark.parametrize("name", sorted(POLICY))
@pytest.mark.parametrize("a", [1.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("q", [-201.0, 199.0, math.nan, -math.inf])
def test_a_masked_target_adds_nothing_whatever_stands_there(name: str, q: float, a: float) -> None:
    lp_T = torch.tensor([-0.5, 0.0, -0.7], requires_grad=True)

    def of(lp_T: torch.Tensor, qs: list[float], advantages: list[float], active: list[bool]) -> torch.Tensor:
        inputs = {"logprobs": torch.tensor(qs), "advantages": torch.tensor(advantages), "weights": torch.ones(len(qs))}
        batch = LossInputs(lp_T, torch.tensor(active), inputs, [len(qs)], LOSSES[name].config)
        return LOSS_FUNCTIONS[name](batch)

    loss_T = of(lp_T, [-0.6, q, -0.6], [1.0, a, -1.0], [True, False, True])
    (slope_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
    alone_T = torch.tensor([-0.5, -0.7], requires_grad=True)
    expected_T = of(alone_T, [-0.6, -0.6], [1.0, -1.0], [True, True])
    (expected_slope_T,) = torch.autograd.grad(expected_T.sum(), alone_T)
    assert torch.equal(loss_T[[0, 2]], expected_T)
    assert torch.equal(slope_T[[0, 2]], expected_slope_T)
    assert (float(loss_T[1].detach()), float(slope_T[1])) == (0.0, 0.0)


def test_the_worst_ratio_goes_through_an_operation(tmp_path: Path) -> None:
    """As it was reported: a clipped token, and one without an advantage, at a ratio of e^200."""
    engine = Engine.load(tiny_models.save("llama", tmp_path / "model"), device="cpu", dtype="float32")
    engine.init_run("run", rank=4, seed=0)
    tokens, targets = Tensor.of([1, 2, 3], "int64"), Tensor.of([2, 3, 4], "int64")
    for name, a in (("ppo", 1.0), ("importance_sampling", 0.0)):
        inputs = {"logprobs": [-203.0, -3.0, -3.0], "advantages": [a, 0.5, 0.5]}
        given = {key: Tensor.of(values, "float32") for key, values in inputs.items()}
        result = engine.forward_backward("run", [Datum(tokens, {"target_tokens": targets, **given})], name, {})
        assert math.isfinite(result.loss)
        assert engine.optim_step("run", AdamParams()).metrics["grad_norm"] > 0
