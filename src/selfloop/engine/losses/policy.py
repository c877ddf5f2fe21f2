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


def dppo(batch: LossInputs) -> Tensor:
    """-keep * adv_tau * A * r + kl_tau * (lp - q)^2, with a trust region in probabilities rather than ratios.

    ``keep`` is 0 where A > 0 and exp(lp) - exp(q) > mask_high, or A <= 0 and exp(lp) - exp(q) < -mask_low: the
    token has already moved far enough. It has no gradient, and the second term acts on dropped tokens, too.
    The default loss of prime-rl, https://github.com/PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/loss.py,
    after https://arxiv.org/abs/2602.04879 (the mask) and https://arxiv.org/abs/2602.02276 (the squared drift).
    """
    logprobs_T, old_T, advantages_T = batch.logprobs_T, batch.inputs["logprobs"], batch.inputs["advantages"]
    moved_T = logprobs_T.detach().exp() - old_T.exp()
    dropped_T = torch.where(
        advantages_T > 0, moved_T > batch.config["dppo_mask_high"], moved_T < -batch.config["dppo_mask_low"]
    )
    gain_T = batch.config["adv_tau"] * advantages_T * _ratio_T(batch)
    penalty_T = batch.config["kl_tau"] * (logprobs_T - old_T).square()
    return _masked(batch, penalty_T - torch.where(dropped_T, 0.0, gain_T))


def sampler_gap(batch: LossInputs) -> dict[str, Tensor]:
    """``sampler_logprob_gap``: the mean of |lp - q| over sampled tokens, times the trained tokens of this batch.

    For tokens of the very policy that is trained it is how far sampler and trainer are apart. Clients mark the tokens
    of a prompt with q = 0 and A = 0; those were not sampled.
    """
    old_T, advantages_T = batch.inputs["logprobs"], batch.inputs["advantages"]
    sampled_T = batch.active_T & ((advantages_T != 0) | (old_T != 0))
    num_trained = (batch.active_T & (batch.inputs["weights"] != 0)).sum()
    gaps_T = torch.where(sampled_T, (batch.logprobs_T.detach() - old_T).abs().double(), 0.0)
    return {"sampler_logprob_gap": gaps_T.sum() * num_trained / sampled_T.sum().clamp(min=1)}


def _ratio_T(batch: LossInputs) -> Tensor:
    return torch.exp(batch.logprobs_T - batch.inputs["logprobs"])


def _clipped(batch: LossInputs, ratio_T: Tensor) -> Tensor:
    return ratio_T.clamp(batch.config["clip_low_threshold"], batch.config["clip_high_threshold"])


def _masked(batch: LossInputs, loss_T: Tensor) -> Tensor:
    return torch.where(batch.active_T, loss_T, 0.0)
