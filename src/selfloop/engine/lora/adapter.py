"""An adapter's parameters: one flat vector, seen as the A and B of every projection.

The flat vector is what is trained, clipped, copied and saved; the views are what is multiplied. The A of
projections that share an input lie next to each other, so that one matmul serves them all.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.lora.targets import adapted_groups
from selfloop.engine.models.spec import ModelSpec, ProjectionGroup
from selfloop.types.lora import LoraTargets

DEFAULT_ALPHA = 32.0

# Of which PEFT 0.21 takes the short names for those of dense matrices, and knows experts as stacks only.
_NAMED_AS_STACKS = frozenset({"qwen2_moe", "qwen3_5_moe_text"})


class LoraGroup(NamedTuple):
    """Adapter of one group of n fused projections: ``a`` is (n * R, in), each of ``b`` is (out, R).

    Of E experts both have that dimension first.
    """

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

    def __init__(self, spec: ModelSpec, rank: int, targets: LoraTargets = LoraTargets()) -> None:
        assert rank >= 1
        self.rank = rank
        self.targets = targets
        self._layers = [adapted_groups(layer, targets) for layer in spec.layers]
        self._head = ProjectionGroup((spec.head,)) if targets.unembed else None
        experts = [group for layer in set(spec.layers) for group in layer.groups if group.num_experts is not None]
        names = frozenset(projection.short_name for group in experts for projection in group.fused)
        self.stacks_experts = bool(experts) and targets.experts and spec.model_type in _NAMED_AS_STACKS
        self._expert_names = frozenset[str]() if spec.model_type in _NAMED_AS_STACKS else names
        groups = [group for layer in self._layers for group in layer]
        self._sizes = [size for group in [*groups, self._head] if group for size in self._group_sizes(group)]
        self.num_parameters = sum(self._sizes)

    @property
    def module_names(self) -> list[str]:
        """The short names of what is adapted, each once, in the order of a layer, without :attr:`parameter_names`."""
        groups = [*(group for layer in self._layers for group in layer), self._head]
        named = [p.short_name for group in groups if group and not self._is_beside(group) for p in group.projections]
        return list(dict.fromkeys(named))

    @property
    def parameter_names(self) -> list[str]:
        """Weights of adapted matrices whose short names PEFT takes for those of experts; it needs their paths."""
        return [
            f"layers.{index}.{projection.name}.weight"
            for index, layer in enumerate(self._layers)
            for group in layer
            if group and self._is_beside(group)
            for projection in group.projections
        ]

    def _is_beside(self, group: ProjectionGroup) -> bool:
        return group.num_experts is None and any(p.short_name in self._expert_names for p in group.projections)

    def _group_sizes(self, group: ProjectionGroup) -> list[int]:
        num = group.num_experts or 1
        a_size = num * len(group.fused) * self.rank * group.in_features
        return [a_size, *(num * size * self.rank for size in group.out_sizes)]

    def adapter(self, flat_P: Tensor, alpha: float) -> Adapter:
        """The multipliable form of ``flat_P``, which is in the compute dtype: views, so gradients flow back into it."""
        assert flat_P.shape == (self.num_parameters,)
        parts = iter(flat_P.split(self._sizes))
        layers = [tuple(self._view(group, parts) if group else None for group in layer) for layer in self._layers]
        head = self._view(self._head, parts) if self._head else None
        return Adapter(alpha / self.rank, layers, flat_P, head)

    def _view(self, group: ProjectionGroup, parts: Iterator[Tensor]) -> LoraGroup:
        first = () if group.num_experts is None else (group.num_experts,)
        a = next(parts).view(*first, -1, group.in_features)
        return LoraGroup(a, tuple(next(parts).view(*first, -1, self.rank) for _ in group.fused))

    def named(self, flat_P: Tensor) -> Iterator[NamedParameter]:
        """Every A and B as a view, under PEFT's module names."""
        adapter = self.adapter(flat_P, alpha=1.0)
        for index, (groups, layer) in enumerate(zip(self._layers, adapter.layers, strict=True)):
            for group, views in zip(groups, layer, strict=True):
                if group is not None and views is not None:
                    yield from self._named(f"layers.{index}.", group, views)
        if self._head is not None and adapter.head is not None:
            yield from self._named("", self._head, adapter.head)

    def _named(self, prefix: str, group: ProjectionGroup, views: LoraGroup) -> Iterator[NamedParameter]:
        """With experts all of the first, then all of the next."""
        if group.num_experts is None:
            pairs = list(zip(views.a.split(self.rank), views.b, strict=True))
        else:
            each = zip(views.a, *views.b, strict=True)
            pairs = [pair for a, *b in each for pair in zip(a.split(self.rank), b, strict=True)]
        for projection, (a_RI, b_OR) in zip(group.projections, pairs, strict=True):
            yield NamedParameter(f"{prefix}{projection.name}.lora_A", "lora_A", a_RI)
            yield NamedParameter(f"{prefix}{projection.name}.lora_B", "lora_B", b_OR)

    @cached_property
    def layout(self) -> str:
        """Which parameter lies where in the flat vector: a digest of their names and places."""
        named = self.named(torch.empty(self.num_parameters, device="meta"))
        places = "".join(f"{parameter.name} {parameter.view.storage_offset()}\n" for parameter in named)
        return hashlib.sha256(places.encode()).hexdigest()[:16]

    def rearranged(self, flat_P: Tensor, layout: "AdapterShape") -> Tensor:
        """In this layout, from a vector in another one of the same parameters."""
        theirs = {parameter.name: parameter.view for parameter in layout.named(flat_P)}
        own_P = torch.empty_like(flat_P)
        for parameter in self.named(own_P):
            parameter.view.copy_(theirs[parameter.name])
        return own_P

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
