"""The losses by name; what each takes is declared in :mod:`selfloop.types.losses`."""

from collections.abc import Callable

from torch import Tensor

from selfloop.engine.losses.cross_entropy import cross_entropy
from selfloop.engine.losses.inputs import LossInputs

LossFunction = Callable[[LossInputs], Tensor]
"""Gives each token's share (T,) of the loss; the objective is their sum."""

LOSS_FUNCTIONS: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
}
