"""Policy-gradient losses over tokens that an earlier policy sampled.

With lp the logprob under the weights being trained, q = ``inputs["logprobs"]`` the logprob under the policy that
sampled the token, A = ``inputs["advantages"]`` and r = exp(lp - q), each function gives every token's share (T,)
of a loss to be minimised. A masked target contributes neither loss nor gradient, whatever its q and A.
"""

import torch
from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs


def importance_sampling(batch: LossInputs) -> Tensor:
    """-r * A: the off-policy policy gradient without clipping."""
    return _masked(batch, -_ratio_T(batch) * batch.inputs["advantages"])


def ppo(batch: LossInputs) -> Tensor:
    """-min(r * A, clip(r, low, high) * A), Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.

    The thresholds are ratios themselves (0.8 and 1.2 for the paper's epsilon of 0.2).
    """
    ratio_T, advantages_T = _ratio_T(batch), batch.inputs["advantages"]
    return _masked(batch, -torch.minimum(ratio_T * advantages_T, _clipped(batch, ratio_T) * advantages_T))


def cispo(batch: LossInputs) -> Tensor:
    """-stop_gradient(clip(r, low, high)) * lp * A, MiniMax-M1 2025, https://arxiv.org/abs/2506.13585."""
    weight_T = _clipped(batch, _ratio_T(batch)).detach()
    return _masked(batch, -weight_T * batch.logprobs_T * batch.inputs["advantages"])


def dro(batch: LossInputs) -> Tensor:
    """-(lp * A - beta / 2 * (lp - q)^2), after Richemond et al. 2024, https://arxiv.org/abs/2405.19107."""
    drift_T = batch.logprobs_T - batch.inputs["logprobs"]
    penalty_T = 0.5 * batch.config["beta"] * drift_T.square()
    return _masked(batch, penalty_T - batch.logprobs_T * batch.inputs["advantages"])


def _ratio_T(batch: LossInputs) -> Tensor:
    return torch.exp(batch.logprobs_T - batch.inputs["logprobs"])


def _clipped(batch: LossInputs, ratio_T: Tensor) -> Tensor:
    return ratio_T.clamp(batch.config["clip_low_threshold"], batch.config["clip_high_threshold"])


def _masked(batch: LossInputs, loss_T: Tensor) -> Tensor:
    return torch.where(batch.active_T, loss_T, 0.0)
