"""Each loss against its formula written out in float64, token by token, with the gradient by differences."""

import math
from collections.abc import Callable

import pytest
import torch

from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.registry import LOSS_FUNCTIONS
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


FORMULAS: dict[str, Formula] = {"importance_sampling": _importance_sampling, "ppo": _ppo, "dro": _dro}
CONFIGS: dict[str, list[dict[str, float | bool]]] = {
    "importance_sampling": [{}],
    "ppo": [LOSSES["ppo"].config, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}],
    "dro": [LOSSES["dro"].config, {"beta": 0.7}],
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


def test_on_policy_all_policy_losses_have_the_policy_gradient() -> None:
    lp, _, a = _random_tokens()
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        lp_T = torch.tensor(lp, requires_grad=True)
        loss_T = LOSS_FUNCTIONS[name](_batch(lp_T, lp, a, LOSSES[name].config))
        (grad_T,) = torch.autograd.grad(loss_T.sum(), lp_T)
        assert torch.allclose(grad_T[:-1], -torch.tensor(a)[:-1], atol=1e-5), name


def test_every_declared_loss_is_there_and_only_those() -> None:
    assert LOSS_FUNCTIONS.keys() == LOSSES.keys()
