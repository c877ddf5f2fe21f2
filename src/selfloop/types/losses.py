"""What each loss takes, declared once: the gateway validates from it, the engine computes by it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from selfloop.types.errors import BadRequest


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Inputs and configuration of one loss.

    Args:
        required: per-token float inputs (N,) that must come with every datum, besides ``target_tokens``.
        one_of: names of one further input that must come with every datum, under exactly one of them.
        optional: per-token float inputs (N,) that may come.
        defaults_to: the input that stands in for an optional one in every datum that lacks it.
        config: configuration fields with their defaults; a bool default makes a flag. Numbers are >= 0.
        at_most: upper bounds of configuration numbers.
        ordered: pairs of configuration fields of which the first may not exceed the second.
        rows: consecutive datums that make one unit: 1, or 2 for a loss of pairs. A unit is never divided.
        many_targets: True when targets may be (N, K), with the optional inputs of the same shape.
    """

    name: str
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    defaults_to: dict[str, str] = field(default_factory=dict[str, str])
    config: dict[str, float | bool] = field(default_factory=dict[str, "float | bool"])
    at_most: dict[str, float] = field(default_factory=dict[str, float])
    ordered: tuple[tuple[str, str], ...] = ()
    rows: int = 1
    many_targets: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every input that a datum may carry."""
        return ("target_tokens", *self.required, *self.one_of, *self.optional)


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


def one_of(given: Collection[str], spec: LossSpec, field: str) -> str:
    """The name under which ``spec.one_of`` came; raises BadRequest below ``field`` for none and for several."""
    found = [name for name in spec.one_of if name in given]
    if len(found) != 1:
        wrong = found[1] if found else spec.one_of[0]
        raise BadRequest(f"{field}.{wrong}", f"{spec.name} takes exactly one of {', '.join(spec.one_of)}")
    return found[0]
