"""Weighted cross entropy."""

from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs


def cross_entropy(batch: LossInputs) -> Tensor:
    """Per-token loss (T,): -w * log p(target), summed over the token's K targets; their sum is the objective.

    A masked target, or a weight of zero, contributes neither loss nor gradient.
    """
    loss = -batch.inputs["weights"] * batch.logprobs_T
    return loss if loss.dim() == 1 else loss.sum(1)
