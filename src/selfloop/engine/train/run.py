"""State of one training run: parameters, moments, accumulated gradient."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.types.settings import KeptAs


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square, float32, flat like the parameters.

    ``num_updates`` counts the steps that had a gradient; the bias corrections go by it.
    """

    mean_P: Tensor
    square_P: Tensor
    num_updates: int


@dataclass(frozen=True, slots=True)
class Accumulated:
    """Gradients since the last step: a plain sum, and what it is to be divided by.

    Args:
        grad_P: float32 sum of gradients.
        num_tokens: trained tokens that went into it.
        normalised: False when the step is to take the sum as it is.
        num_pairs: trained pairs that went into it; None when it is divided by tokens.
    """

    grad_P: Tensor
    num_tokens: int
    normalised: bool
    num_pairs: int | None = None


class ComputedIn(msgspec.Struct, frozen=True):
    """What a run's numbers depend on besides its operations: the compute type, and the form of base weights that are
    kept in another.
    """

    dtype: str
    base_dtype: KeptAs | None = None

    def __str__(self) -> str:
        return self.dtype if self.base_dtype is None else f"{self.dtype} with base weights in {self.base_dtype}"


@dataclass(slots=True)
class Run:
    """A run's whole training state.

    Args:
        moments: None until the first step that had a gradient.
        computed_in: as it was last; None where that is not known.
    """

    shape: AdapterShape
    alpha: float
    theta_P: Tensor
    step: int = 0
    moments: Moments | None = None
    accumulated: Accumulated | None = None
    computed_in: ComputedIn | None = None

    def copy(self) -> "Run":
        """The state as it is now, on the CPU. Gradients are shared: each sum of them is a tensor of its own."""
        moments = self.moments
        if moments is not None:
            moments = Moments(_on_cpu(moments.mean_P), _on_cpu(moments.square_P), moments.num_updates)
        return replace(self, theta_P=_on_cpu(self.theta_P), moments=moments)

    def frozen_adapter(self, dtype: torch.dtype) -> Adapter:
        """A copy of the adapter as it is now, in ``dtype``."""
        return self.shape.adapter(self.theta_P.detach().to(dtype, copy=True), self.alpha)


def _on_cpu(values_P: Tensor) -> Tensor:
    return values_P.detach().to("cpu", copy=True)
