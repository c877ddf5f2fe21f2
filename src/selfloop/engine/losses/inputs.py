"""What a loss function is given."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch of packed sequences.

    With K targets a token the tensors are (T, K) instead of (T,).

    Args:
        logprobs_T: float32 logprob of each target under the weights being trained; 0 where masked.
        active_T: True where the target is not masked.
        inputs: float32 (T,) per-token inputs by name; ``weights`` is always there, 1 by default.
        lengths: tokens of each sequence, in order.
        config: the loss's configuration, every field present.
    """

    logprobs_T: Tensor
    active_T: Tensor
    inputs: Mapping[str, Tensor]
    lengths: list[int]
    config: Mapping[str, float | bool]
