"""Weighted cross entropy."""

from jaxtyping import Float
from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs


def cross_entropy(batch: LossInputs) -> Float[Tensor, " T"]:
    """Per-token loss (T,): -w * log p(target), summed over the token's K targets; their sum is the objective.

    A masked target, or a weight of zero, contributes neither loss nor gradient.
    """
    loss = -batch.inputs["weights"] * batch.logprobs
    return loss if loss.dim() == 1 else loss.sum(1)
