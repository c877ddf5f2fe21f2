"""Policy-gradient losses over tokens that an earlier policy sampled.

With lp the logprob under the weights being trained, q = ``inputs["logprobs"]`` the logprob under the policy that
sampled the token, A = ``inputs["advantages"]`` and r = exp(lp - q), each function gives every token's share (T,)
of a loss to be minimised. A masked target contributes neither loss nor gradient, whatever its q and A. Nor does a term
whose factor is 0, such as an advantage of 0, whatever its r: an exponential is taken only where it counts, as 0 times
infinity is no number, and infinity times a gradient of 0 is none either.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs


def importance_sampling(batch: LossInputs) -> Float[Tensor, " T"]:
    """-r * A: the off-policy policy gradient without clipping."""
    advantages_T = _advantages_T(batch)
    return -ratio_where(advantages_T != 0, _drift_T(batch)) * advantages_T


def ppo(batch: LossInputs) -> Float[Tensor, " T"]:
    """-min(r * A, clip(r, low, high) * A), Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7.

    The thresholds are ratios themselves (0.8 and 1.2 for the paper's epsilon of 0.2).
    """
    bounds = batch.config["clip_low_threshold"], batch.config["clip_high_threshold"]
    return clipped_gain(_drift_T(batch), _advantages_T(batch), *bounds).neg()


def cispo(batch: LossInputs) -> Float[Tensor, " T"]:
    """-stop_gradient(clip(r, low, high)) * lp * A, MiniMax-M1 2025, https://arxiv.org/abs/2506.13585."""
    advantages_T = _advantages_T(batch)
    ratio_T = ratio_where(advantages_T != 0, _drift_T(batch).detach())
    weight_T = ratio_T.clamp(batch.config["clip_low_threshold"], batch.config["clip_high_threshold"])
    return -(weight_T * advantages_T) * batch.logprobs


def dro(batch: LossInputs) -> Float[Tensor, " T"]:
    """-(lp * A - beta / 2 * (lp - q)^2), after Richemond et al. 2024, https://arxiv.org/abs/2405.19107."""
    return squared(_drift_T(batch), 0.5 * batch.config["beta"]) - batch.logprobs * _advantages_T(batch)


def dppo(batch: LossInputs) -> Float[Tensor, " T"]:
    """-keep * adv_tau * A * r + kl_tau * (lp - q)^2, with a trust region in probabilities rather than ratios.

    ``keep`` is 0 where A > 0 and exp(lp) - exp(q) > mask_high, or A <= 0 and exp(lp) - exp(q) < -mask_low: the
    token has already moved far enough. It has no gradient, and the second term acts on dropped tokens, too.
    The default loss of prime-rl, https://github.com/PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/loss.py,
    after https://arxiv.org/abs/2602.04879 (the mask) and https://arxiv.org/abs/2602.02276 (the squared drift).
    """
    advantages_T, drift_T = _advantages_T(batch), _drift_T(batch)
    moved_T = batch.logprobs.detach().exp() - batch.inputs["logprobs"].exp()
    dropped_T = torch.where(
        advantages_T > 0, moved_T > batch.config["dppo_mask_high"], moved_T < -batch.config["dppo_mask_low"]
    )
    factor_T = torch.where(dropped_T, 0.0, batch.config["adv_tau"] * advantages_T)
    return squared(drift_T, batch.config["kl_tau"]) - factor_T * ratio_where(factor_T != 0, drift_T)


def policy_metrics(batch: LossInputs) -> dict[str, Shaped[Tensor, ""]]:
    """Means over the sampled tokens, each times the trained tokens of this batch.

    ``sampler_logprob_gap`` is |lp - q|: for tokens of the very policy that is trained, how far sampler and trainer are
    apart. ``kl_sampler_trainer`` is q - lp, whose mean estimates the divergence of the sampling policy from the
    trained one (k1 of Schulman 2020, http://joschu.net/blog/kl-approx.html). ``advantage_mean`` is A. Clients mark the
    tokens of a prompt with q = 0 and A = 0; those were not sampled.
    """
    old_T, advantages_T = batch.inputs["logprobs"], batch.inputs["advantages"]
    sampled_T = batch.active & ((advantages_T != 0) | (old_T != 0))
    num_trained = (batch.active & (batch.inputs["weights"] != 0)).sum()
    share = num_trained / sampled_T.sum().clamp(min=1)
    behind_T = torch.where(sampled_T, old_T - batch.logprobs.detach(), 0.0).double()
    return {
        "sampler_logprob_gap": behind_T.abs().sum() * share,
        "kl_sampler_trainer": behind_T.sum() * share,
        "advantage_mean": torch.where(sampled_T, advantages_T, 0.0).double().sum() * share,
    }


def clipped_gain(
    drift_T: Float[Tensor, " T"], advantages_T: Float[Tensor, " T"], low: float, high: float
) -> Float[Tensor, " T"]:
    """min(r * A, clip(r, low, high) * A) of r = exp(``drift_T``).

    Where A > 0 that is A * min(r, high), where A < 0 it is A * max(r, low): beyond the bound there is no gradient.
    """
    ratio_T = drift_T.detach().exp()
    above_T, below_T = (advantages_T > 0) & (ratio_T > high), (advantages_T < 0) & (ratio_T < low)
    free_T = ratio_where((advantages_T != 0) & ~above_T & ~below_T, drift_T)
    return advantages_T * torch.where(above_T, high, torch.where(below_T, low, free_T))


def ratio_where(counts_T: Bool[Tensor, " T"], drift_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """exp(``drift_T``) where it counts; 1 elsewhere, without gradient."""
    return torch.exp(torch.where(counts_T, drift_T, 0.0))


def squared(drift_T: Float[Tensor, " T"], factor: float) -> Float[Tensor, " T"]:
    """factor * drift^2; 0 for a factor of 0."""
    return factor * drift_T * drift_T if factor != 0 else torch.zeros_like(drift_T)


def _drift_T(batch: LossInputs) -> Float[Tensor, " T"]:
    """lp - q; 0 where masked."""
    return torch.where(batch.active, batch.logprobs - batch.inputs["logprobs"], 0.0)


def _advantages_T(batch: LossInputs) -> Float[Tensor, " T"]:
    """0 where masked."""
    return torch.where(batch.active, batch.inputs["advantages"], 0.0)
