"""The losses by name; what each takes is declared in :mod:`selfloop.types.losses`."""

from collections.abc import Callable

from torch import Tensor

from selfloop.engine.losses.cross_entropy import cross_entropy
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.policy import cispo, dppo, dro, importance_sampling, ppo, sampler_gap
from selfloop.engine.losses.preference import dpo, dpo_metrics
from selfloop.engine.losses.sequence import gspo, stable_reinforce

LossFunction = Callable[[LossInputs], Tensor]
"""Gives each token's share (T,) of the loss, or each pair's (G,); the objective is their sum."""

MetricsFunction = Callable[[LossInputs], dict[str, Tensor]]
"""Sums over the trained tokens, or pairs; what is reported is the mean."""

LOSS_FUNCTIONS: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
    "stable_reinforce": stable_reinforce,
    "dppo": dppo,
    "dpo": dpo,
}

METRICS_FUNCTIONS: dict[str, MetricsFunction] = {
    "dpo": dpo_metrics,
    **dict.fromkeys(
        ("importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "dppo"),
        sampler_gap,
    ),
}
