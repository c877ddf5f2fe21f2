"""Focal loss: cross entropy that counts a token less, the better it is predicted already."""

import torch
from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs


def focal(batch: LossInputs) -> Tensor:
    """-w (1 - p)^gamma log p for each token (T,); Lin et al. 2017, https://arxiv.org/abs/1708.02002, eq. 4.

    A masked target contributes neither loss nor gradient.
    """
    lp_T = torch.where(batch.active, batch.logprobs, -1.0)
    # The bound keeps the gradient finite for a gamma below 1.
    missed_T = -torch.expm1(lp_T).clamp(max=-1e-6)
    loss_T = -batch.inputs["weights"] * missed_T ** batch.config["gamma"] * lp_T
    return torch.where(batch.active, loss_T, 0.0)
