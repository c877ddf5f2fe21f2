"""What a loss function is given."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch of packed sequences: T tokens, and with several targets a token K columns.

    Shapes are annotations of ``jaxtyping``; the tests check them in every call.

    Args:
        logprobs: float32 logprob of each target under the weights being trained; 0 where masked.
        active: True where the target is not masked.
        inputs: float32 per-token inputs by name; ``weights`` is always there, 1 by default.
        lengths: tokens of each sequence, in order.
        config: the loss's configuration, every field present.
    """

    logprobs: Float[Tensor, "T *K"]
    active: Bool[Tensor, "T *K"]
    inputs: Mapping[str, Float[Tensor, "T *K"]]
    lengths: list[int]
    config: Mapping[str, float | bool]
