"""Losses with one ratio a sequence against their formulas, written out in float64."""

import math

import pytest
import torch

from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.registry import LOSS_FUNCTIONS
from selfloop.types.losses import LOSSES

LENGTHS = [3, 2]
LP = [-0.5, -1.0, -2.0, -0.3, -0.7]
Q = [-0.6, -1.3, -1.8, -0.9, -0.7]
A = [0.0, 1.0, -0.5, 2.0, 0.0]


def batch(lp_T: torch.Tensor, config: dict[str, float | bool], **inputs: list[float]) -> LossInputs:
    given = {"logprobs": Q, "advantages": A, **inputs}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in given.items()}
    return LossInputs(lp_T, torch.ones(5, dtype=torch.bool), tensors, LENGTHS, config)


def rows() -> list[range]:
    return [range(3), range(3, 5)]


def gspo(config: dict[str, float | bool], mask: list[float]) -> tuple[list[float], list[float]]:
    """Losses, and their slopes in each token's own logprob."""
    losses, slopes = [0.0] * 5, [0.0] * 5
    low, high = 1 - config["clip_low_threshold"], 1 + config["clip_high_threshold"]
    for row in rows():
        counted = [i for i in row if mask[i] != 0]
        ratio = math.exp(sum(LP[i] - Q[i] for i in counted) / len(counted)) if counted else 1.0
        for i in row:
            plain, clipped = ratio * A[i], min(max(ratio, low), high) * A[i]
            losses[i] = -min(plain, clipped)
            slopes[i] = -plain if plain <= clipped and (plain < clipped or low <= ratio <= high) else 0.0
    return losses, slopes


@pytest.mark.parametrize("config", [LOSSES["gspo"].config, {"clip_low_threshold": 0.5, "clip_high_threshold": 0.9}])
@pytest.mark.parametrize("mask", [None, [1.0, 1.0, 0.0, 0.0, 1.0]])
def test_gspo(config: dict[str, float | bool], mask: list[float] | None):
    lp_T = torch.tensor(LP, dtype=torch.float64, requires_grad=True)
    given = {} if mask is None else {"sequence_ratio_mask": mask}
    loss_T = LOSS_FUNCTIONS["gspo"](batch(lp_T, config, **given))
    losses, slopes = gspo(config, mask or A)
    assert loss_T.tolist() == pytest.approx(losses)
    loss_T.sum().backward()
    assert lp_T.grad is not None
    assert lp_T.grad.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("config", [{"ratio_cap": 2.0, "kl_coeff": 0.0}, {"ratio_cap": 1.05, "kl_coeff": 0.3}])
def test_stable_reinforce(config: dict[str, float | bool]):
    lp_T = torch.tensor(LP, dtype=torch.float64, requires_grad=True)
    loss_T = LOSS_FUNCTIONS["stable_reinforce"](batch(lp_T, config))
    losses, slopes = [0.0] * 5, [0.0] * 5
    for row in rows():
        ratio = min(math.exp(sum(LP[i] - Q[i] for i in row if A[i] != 0)), config["ratio_cap"])
        for i in row:
            kl = config["kl_coeff"] if A[i] != 0 else 0.0
            losses[i] = kl * (LP[i] - Q[i]) ** 2 / 2 - ratio * LP[i] * A[i]
            slopes[i] = kl * (LP[i] - Q[i]) - ratio * A[i]
    assert loss_T.tolist() == pytest.approx(losses)
    loss_T.sum().backward()
    assert lp_T.grad is not None
    assert lp_T.grad.tolist() == pytest.approx(slopes)
