"""What a layer asks of its blocks, and what it gives them."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.recurrence import Recurrence
from selfloop.engine.backends.torch.rotary import Rotations
from selfloop.engine.lora.grouped_matmul import LoraSegment
from selfloop.engine.models.spec import Block, FullAttention

SegmentsOf = Callable[[int], list[LoraSegment]]
"""The adapters of a layer's group by its number, with the rows that each is for."""


class LayerPass(Protocol):
    """One layer of a pass over packed rows: training and prefill."""

    @property
    def rotations(self) -> Rotations:
        """cos and sin of each row, by each rope."""
        ...

    def project(self, group: int, linear: FrozenLinear, x_TI: Tensor) -> Tensor:
        """(T, in) -> (T, out) of the layer's group of that number, its adapters included."""
        ...

    def attend(
        self, spec: FullAttention, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """Rotated queries and keys, values, float32 sinks where the spec has some -> (T, H, head_dim)."""
        ...

    @property
    def recurrence(self) -> Recurrence:
        """How the rows follow one another, for a layer with a state."""
        ...

    @property
    def place(self) -> int:
        """The layer's number among those that keep the like of a sequence."""
        ...

    def routed(self, chosen_TK: Tensor) -> Tensor:
        """int64 (T, K) experts that the rows go to, where the layer's router has chosen ``chosen_TK``."""
        ...

    def in_blocks(self, act: Callable[..., Tensor], *each: Tensor) -> Tensor:
        """``act`` on all rows, or in a batch-invariant pass on each run's rows by themselves.

        It is given the adapters of the rows (a :data:`SegmentsOf`), then the rows of ``each``.
        """
        ...


class LayerStep(Protocol):
    """One layer of a decode step, a row for each sample. Between the products everything is float32."""

    @property
    def rotations(self) -> Rotations:
        """By each rope, cos (B, H + G, 1, d/2) and -sin, sin (B, H + G, 2, d/2), the queries' scaled."""
        ...

    def project(self, group: int, linear: FrozenLinear, x_BI: Tensor) -> Tensor:
        """float32 (B, in) -> float32 (B, out) of the layer's group of that number, its adapters included."""
        ...

    def attend(self, qkv_BHd: Tensor, sinks_H: Tensor | None) -> Tensor:
        """(B, H + 2G, head_dim) rotated, queries scaled, and sinks as above -> (B, H * head_dim)."""
        ...

    @property
    def recurrence(self) -> Recurrence: ...

    @property
    def place(self) -> int: ...

    def routed(self, chosen_BK: Tensor) -> Tensor: ...

    def segments(self, group: int) -> list[LoraSegment]:
        """The adapters of the layer's group of that number, for a block that multiplies by itself."""
        ...

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm with the model's epsilon, in float32."""
        ...


class TorchBlock(Protocol):
    """A mixer or feed-forward with its weights."""

    def linears(self) -> list[FrozenLinear]:
        """Its matrices, each of which is laid out once; of a dense block those of its spec's groups, in their order."""
        ...

    def __call__(self, x_TD: Tensor, at: LayerPass) -> Tensor:
        """Normalised rows in the compute dtype -> what is added to h; gradients reach x and the adapters."""
        ...

    def step(self, x_BD: Tensor, at: LayerStep) -> Tensor:
        """The same of a decode step, float32 in and out; no gradients."""
        ...


Build = Callable[[Block, int, Places], TorchBlock]
"""From a block's spec, the number of its first group in the layer, and the places that its tensors are to go to."""


def has_block(kind: str) -> bool:
    return find_spec(f"{__package__}.{kind}") is not None


def block_builder(kind: str) -> Build:
    """The ``build`` of the block's file."""
    return import_module(f"{__package__}.{kind}").build


def float32(weight: Tensor) -> Tensor:
    """A copy of a small weight for decode steps; itself where it is float32 already."""
    return weight.to(torch.float32)
