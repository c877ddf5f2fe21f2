"""The losses by name; what each takes is declared in :mod:`selfloop.types.losses`."""

from collections.abc import Callable

from torch import Tensor

from selfloop.engine.losses.cross_entropy import cross_entropy
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.policy import cispo, dro, importance_sampling, ppo

LossFunction = Callable[[LossInputs], Tensor]
"""Gives each token's share (T,) of the loss; the objective is their sum."""

LOSS_FUNCTIONS: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
}
