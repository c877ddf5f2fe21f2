"""Weighted cross entropy."""

from torch import Tensor

from selfloop.engine.losses.inputs import LossInputs


def cross_entropy(batch: LossInputs) -> Tensor:
    """Per-token loss (T,): -w * log p(target); their sum is the objective.

    A masked target, or a weight of zero, contributes neither loss nor gradient.
    """
    return -batch.inputs["weights"] * batch.logprobs_T
