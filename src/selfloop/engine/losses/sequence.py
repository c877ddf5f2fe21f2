"""Policy-gradient losses with one importance ratio a sequence; names as in :mod:`selfloop.engine.losses.policy`.

Which tokens make up a sequence's ratio: those that ``sequence_ratio_mask`` marks with another number than 0; of a datum
without it, those whose advantage is not 0. Masked targets never do. A sequence without such a token has the ratio 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.policy import clipped_gain, squared


def gspo(batch: LossInputs) -> Float[Tensor, " T"]:
    """-min(s * A, clip(s, 1 - low, 1 + high) * A) a token, Zheng et al. 2025, https://arxiv.org/abs/2507.18071, eq. 5.

    s is the sequence's exp(mean(lp - q)); each token's s carries the gradient of its own lp alone (the paper's
    GSPO-token, eq. 14). The thresholds are distances from 1.
    """
    own_T = batch.logprobs - batch.logprobs.detach()
    low, high = 1 - batch.config["clip_low_threshold"], 1 + batch.config["clip_high_threshold"]
    advantages_T = torch.where(batch.active, batch.inputs["advantages"], 0.0)
    return clipped_gain(_per_token(batch, _drift(batch, mean=True)) + own_T, advantages_T, low, high).neg()


def stable_reinforce(batch: LossInputs) -> Float[Tensor, " T"]:
    """-min(r, ratio_cap) * lp * A + kl_coeff * (lp - q)^2 / 2, r = exp(sum(lp - q)) of the sequence, without gradient.

    The loss known under this name is not published. This is REINFORCE (Williams 1992,
    https://doi.org/10.1007/BF00992696) corrected for samples of an older policy by truncated importance sampling
    (Ionides 2008, https://doi.org/10.1198/106186008X320456) over whole sequences.
    """
    advantages_T = torch.where(batch.active, batch.inputs["advantages"], 0.0)
    ratio_T = _per_token(batch, torch.exp(_drift(batch, mean=False)).clamp(max=batch.config["ratio_cap"]))
    drift_T = torch.where(advantages_T != 0, batch.logprobs - batch.inputs["logprobs"], 0.0)
    return squared(drift_T, 0.5 * batch.config["kl_coeff"]) - ratio_T * advantages_T * batch.logprobs


def _drift(batch: LossInputs, *, mean: bool) -> Float[Tensor, " B"]:
    """lp - q of each sequence (B,), summed or averaged over its tokens; without gradient."""
    mask_T = batch.inputs.get("sequence_ratio_mask", batch.inputs["advantages"])
    counted_T = batch.active & (mask_T != 0)
    drift_T = torch.where(counted_T, batch.logprobs.detach() - batch.inputs["logprobs"], 0.0)
    sums_B = torch.stack([row.sum() for row in drift_T.split(batch.lengths)])
    if not mean:
        return sums_B
    counts_B = torch.stack([row.sum() for row in counted_T.split(batch.lengths)])
    return sums_B / counts_B.clamp(min=1)


def _per_token(batch: LossInputs, values_B: Float[Tensor, " B"]) -> Float[Tensor, " T"]:
    lengths_B = torch.tensor(batch.lengths, device=values_B.device)
    return values_B.repeat_interleave(lengths_B)
