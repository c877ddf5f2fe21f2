"""The losses by name; what each takes is declared in :mod:`selfloop.types.losses`.

An installed package adds a function with an entry point of the loss's name in ``selfloop.loss_functions``, and what it
reports besides, if anything, with one in ``selfloop.loss_metrics``.
"""

from collections.abc import Callable
from importlib.metadata import entry_points

from torch import Tensor

from selfloop.engine.losses.cross_entropy import cross_entropy
from selfloop.engine.losses.inputs import LossInputs
from selfloop.engine.losses.policy import cispo, dppo, dro, importance_sampling, policy_metrics, ppo
from selfloop.engine.losses.preference import dpo, dpo_metrics
from selfloop.engine.losses.sequence import gspo, stable_reinforce
from selfloop.types.losses import LOSSES

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
        policy_metrics,
    ),
}


def _add_installed() -> None:
    for group, table in (("selfloop.loss_functions", LOSS_FUNCTIONS), ("selfloop.loss_metrics", METRICS_FUNCTIONS)):
        for point in entry_points(group=group):
            if point.name in table:
                raise ValueError(f"entry point {point.name} = {point.value}: there is a loss of this name already")
            table[point.name] = point.load()
    if LOSS_FUNCTIONS.keys() != LOSSES.keys():
        names = ", ".join(sorted(LOSS_FUNCTIONS.keys() ^ LOSSES.keys()))
        raise LookupError(f"losses that lack an entry point in selfloop.loss_specs or selfloop.loss_functions: {names}")


_add_installed()
