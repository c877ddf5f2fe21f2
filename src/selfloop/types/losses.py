"""What each loss takes, declared once: the gateway validates from it, the engine computes by it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Inputs and configuration of one loss.

    Args:
        required: per-token float inputs (N,) that must come with every datum, besides ``target_tokens``.
        optional: per-token float inputs (N,) that may come.
        config: configuration fields with their defaults; a bool default makes a flag.
    """

    name: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: dict[str, float | bool] = field(default_factory=dict[str, "float | bool"])


_POLICY = ("logprobs", "advantages")
_CLIP: dict[str, float | bool] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: dict[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec(
            "cross_entropy",
            optional=("weights",),
            config={"skip_token_normalization": False},
        ),
        LossSpec("importance_sampling", required=_POLICY),
        LossSpec("ppo", required=_POLICY, config=_CLIP),
        LossSpec("cispo", required=_POLICY, config=_CLIP),
        LossSpec("dro", required=_POLICY, config={"beta": 0.05}),
    )
}
