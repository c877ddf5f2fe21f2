"""Which experts the rows of a batch go to: noted while a model samples, given while it trains.

Rollout routing replay (R3), Ma et al. 2025, https://arxiv.org/abs/2510.11370: a router that chooses differently in the
trainer than in the sampler makes another policy of the same weights. Only the choice is replayed. What each chosen
expert counts is computed anew of the router's logits, so gradients flow as they do without a replay.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfloop.engine.models.mixture_of_experts import MixtureOfExperts
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.routes import RouteShape

_DTYPES = {"uint8": torch.uint8, "int16": torch.int16}
NO_ROUTES = "the served model has no experts whose choice can be recorded and replayed"
ANEW = -1
"""In place of an expert: the row's own router decides."""


class Mixtures(NamedTuple):
    """The layers of a model that have experts, by their numbers, and how their choices are written down."""

    layers: tuple[int, ...]
    num_experts: int
    shape: RouteShape

    @classmethod
    def of(cls, spec: ModelSpec) -> "Mixtures | None":
        """None where there are none, or not all have as many and choose as many."""
        found = {
            index: layer.feed_forward
            for index, layer in enumerate(spec.layers)
            if isinstance(layer.feed_forward, MixtureOfExperts)
        }
        sizes = {(mixture.router.num_experts, mixture.router.top_k) for mixture in found.values()}
        if len(sizes) != 1:
            return None
        ((num_experts, top_k),) = sizes
        return cls(tuple(found), num_experts, RouteShape("uint8" if num_experts <= 256 else "int16", len(found), top_k))

    def packed(self, experts_NLK: Tensor) -> bytes:
        return experts_NLK.to("cpu", _DTYPES[self.shape.dtype]).contiguous().numpy().tobytes()

    def unpacked(self, data: bytes) -> Tensor:
        """int16 (N, L, K), on the CPU."""
        shape = (-1, self.shape.num_layers, self.shape.top_k)
        if not data:
            return torch.empty((0, *shape[1:]), dtype=torch.int16)
        return torch.frombuffer(bytearray(data), dtype=_DTYPES[self.shape.dtype]).reshape(shape).to(torch.int16)


class Routing(Protocol):
    """Asked by every layer with experts, in each pass."""

    def experts(self, layer: int, chosen_TK: Tensor) -> Tensor:
        """int64 (T, K), ascending, that the rows go to, where the layer's own router has chosen ``chosen_TK``."""
        ...


class Replay:
    """Rows go where they went before."""

    def __init__(self, mixtures: Mixtures, experts_TLK: Tensor) -> None:
        """``experts_TLK`` on the model's device; :data:`ANEW` leaves a row to the router."""
        ascending_TLK = experts_TLK.long().sort(dim=-1).values
        self._given = dict(zip(mixtures.layers, ascending_TLK.unbind(1), strict=True))

    def experts(self, layer: int, chosen_TK: Tensor) -> Tensor:
        given_TK = self._given[layer]
        return torch.where(given_TK == ANEW, chosen_TK, given_TK)


class Recording:
    """Rows go where the router sends them, and that is noted."""

    def __init__(self, mixtures: Mixtures) -> None:
        self._mixtures = mixtures
        self._chosen: dict[int, Tensor] = {}

    def experts(self, layer: int, chosen_TK: Tensor) -> Tensor:
        self._chosen[layer] = chosen_TK
        return chosen_TK

    def experts_TLK(self) -> Tensor:
        """int16, on the CPU, once the pass is over."""
        chosen = [self._chosen[layer].to(torch.int16) for layer in self._mixtures.layers]
        return torch.stack(chosen, dim=1).cpu()


def replayed(
    mixtures: Mixtures | None, parts: Sequence[tuple[int, Tensor | None]], device: torch.device
) -> Replay | None:
    """Of rows one after another, each part of so many rows with or without its experts; None where none has any."""
    if mixtures is None or all(experts is None for _, experts in parts):
        return None
    tail = (mixtures.shape.num_layers, mixtures.shape.top_k)
    rows = [
        torch.full((size, *tail), ANEW, dtype=torch.int16, device=device) if experts is None else experts
        for size, experts in parts
    ]
    return Replay(mixtures, torch.cat(rows))
