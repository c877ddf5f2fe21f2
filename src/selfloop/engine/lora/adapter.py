"""An adapter's parameters: one flat vector, seen as the A and B of every projection.

The flat vector is what is trained, clipped, copied and saved; the views are what is multiplied. The A of
projections that share an input lie next to each other, so that one matmul serves them all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.lora.targets import LinearGroup, adapted_groups, head_group
from selfloop.engine.models.config import ModelConfig
from selfloop.types.lora import LoraTargets

DEFAULT_ALPHA = 32.0


class LoraGroup(NamedTuple):
    """Adapter of one group of n fused projections: ``a`` is (n * R, in), each of ``b`` is (out, R)."""

    a: Tensor
    b: tuple[Tensor, ...]


class NamedParameter(NamedTuple):
    """A (R, in) or B (out, R) of one projection, under PEFT's name for it."""

    name: str
    kind: Literal["lora_A", "lora_B"]
    view: Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """An adapter ready to be multiplied: compute dtype, scaling = alpha / rank; None where nothing is adapted.

    A and B are views of ``flat_P``.
    """

    scaling: float
    layers: list[tuple[LoraGroup | None, ...]]
    flat_P: Tensor
    head: LoraGroup | None = None


class AdapterShape:
    """Layout of the flat vector for one model, rank and choice of targets: layer by layer, then the head."""

    def __init__(self, config: ModelConfig, rank: int, targets: LoraTargets = LoraTargets()) -> None:
        assert rank >= 1
        self.rank = rank
        self.targets = targets
        self.num_layers = config.num_layers
        self._groups = adapted_groups(config, targets)
        self._head = head_group(config) if targets.unembed else None
        self._layer_sizes = [size for group in self._groups if group for size in self._group_sizes(group)]
        self._head_sizes = self._group_sizes(self._head) if self._head else []
        self.num_parameters = self.num_layers * sum(self._layer_sizes) + sum(self._head_sizes)

    def _group_sizes(self, group: LinearGroup) -> list[int]:
        a_size = len(group.targets) * self.rank * group.in_features
        return [a_size, *(target.out_features * self.rank for target in group.targets)]

    def adapter(self, flat_P: Tensor, alpha: float) -> Adapter:
        """The multipliable form of ``flat_P``, which is in the compute dtype: views, so gradients flow back into it."""
        assert flat_P.shape == (self.num_parameters,)
        parts = iter(flat_P.split(self._layer_sizes * self.num_layers + self._head_sizes))
        layers = [
            tuple(self._view(group, parts) if group else None for group in self._groups) for _ in range(self.num_layers)
        ]
        head = self._view(self._head, parts) if self._head else None
        return Adapter(alpha / self.rank, layers, flat_P, head)

    def _view(self, group: LinearGroup, parts: Iterator[Tensor]) -> LoraGroup:
        a = next(parts).view(-1, group.in_features)
        return LoraGroup(a, tuple(next(parts).view(-1, self.rank) for _ in group.targets))

    def named(self, flat_P: Tensor) -> Iterator[NamedParameter]:
        """Every A and B as a view, under PEFT's module names."""
        adapter = self.adapter(flat_P, alpha=1.0)
        for index, layer in enumerate(adapter.layers):
            for group, views in zip(self._groups, layer, strict=True):
                if group is not None and views is not None:
                    yield from self._named(f"layers.{index}.", group, views)
        if self._head is not None and adapter.head is not None:
            yield from self._named("", self._head, adapter.head)

    def _named(self, prefix: str, group: LinearGroup, views: LoraGroup) -> Iterator[NamedParameter]:
        for target, a_RI, b_OR in zip(group.targets, views.a.split(self.rank), views.b, strict=True):
            yield NamedParameter(f"{prefix}{target.module}.lora_A", "lora_A", a_RI)
            yield NamedParameter(f"{prefix}{target.module}.lora_B", "lora_B", b_OR)

    def changes_nothing(self, flat_P: Tensor) -> bool:
        """Whether the model with it is the base model: A or B of each projection is zero, as a fresh adapter's B is."""
        parts = list(self.named(flat_P))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return all(not bool(a.view.any()) or not bool(b.view.any()) for a, b in pairs)

    def initial(self, seed: int) -> Tensor:
        """Fresh flat float32 parameters on the CPU: A as PEFT draws it, B zero.

        PEFT: kaiming_uniform_(A, a=sqrt(5)), which is uniform within 1/sqrt(in).
        """
        generator = torch.Generator().manual_seed(seed)
        flat_P = torch.zeros(self.num_parameters)
        for parameter in self.named(flat_P):
            if parameter.kind == "lora_A":
                bound = 1 / math.sqrt(parameter.view.shape[1])
                parameter.view.uniform_(-bound, bound, generator=generator)
        return flat_P
