"""Every loss that a request may name: those of the engine and those of installed packages.

A package adds a loss with two entry points of the loss's name: its declaration in ``selfloop.loss_specs``, whose module
must not import torch, and its function in ``selfloop.loss_functions`` (:mod:`selfloop.engine.losses.registry`).
"""

from importlib.metadata import entry_points

from selfloop.types.loss_spec import LossSpec

_POLICY = ("logprobs", "advantages")
_CLIP: dict[str, float | bool] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_CLIP_ORDER = (("clip_low_threshold", "clip_high_threshold"),)

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(
            "cross_entropy",
            optional=("weights",),
            config={"skip_token_normalization": False},
            many_targets=True,
        ),
        LossSpec("importance_sampling", required=_POLICY),
        LossSpec("ppo", required=_POLICY, config=_CLIP, ordered=_CLIP_ORDER),
        LossSpec("cispo", required=_POLICY, config=_CLIP, ordered=_CLIP_ORDER),
        LossSpec("dro", required=_POLICY, config={"beta": 0.05}),
        LossSpec(
            "gspo",
            required=_POLICY,
            optional=("sequence_ratio_mask",),
            defaults_to={"sequence_ratio_mask": "advantages"},
            # Distances from a ratio of 1, as in its paper.
            config={"clip_low_threshold": 3e-4, "clip_high_threshold": 4e-4},
        ),
        LossSpec("stable_reinforce", required=_POLICY, config={"ratio_cap": 2.0, "kl_coeff": 0.0}),
        LossSpec(
            "dppo",
            required=_POLICY,
            config={"dppo_mask_high": 0.2, "dppo_mask_low": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3},
        ),
        LossSpec(
            "dpo",
            # The official client's helper writes the first name; the interface it was read out of has the second.
            one_of=("ref_logprobs", "logprobs"),
            optional=("weights",),
            config={"beta": 0.1, "label_smoothing": 0.0},
            # At one half both answers count the same; beyond it the rejected one would be preferred.
            at_most={"label_smoothing": 0.5},
            rows=2,
        ),
    )
}


def _add_installed() -> None:
    for point in entry_points(group="selfloop.loss_specs"):
        spec = point.load()
        if not isinstance(spec, LossSpec) or spec.name != point.name:
            raise TypeError(f"entry point {point.name} = {point.value}: expected a LossSpec named {point.name!r}")
        if spec.name in LOSSES:
            raise ValueError(f"entry point {point.name} = {point.value}: there is a loss of this name already")
        LOSSES[spec.name] = spec


_add_installed()
