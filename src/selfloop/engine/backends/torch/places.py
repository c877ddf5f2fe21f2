"""Where each named tensor of a checkpoint goes: a slice of an allocated weight."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.models.spec import Projection, ProjectionGroup
from selfloop.engine.models.weights import TensorSource
from selfloop.types.errors import OperationFailed


class _Slot(NamedTuple):
    place: Tensor
    shape: torch.Size


class Places:
    """Weights allocated by name on a device, to be filled out of a source."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._prefix = ""
        self._slots: dict[str, _Slot] = {}
        self._after: list[Callable[[], object]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def inside(self, prefix: str) -> "Places":
        """The same places, for names that begin with ``prefix``."""
        inner = Places(self._device, self._dtype)
        inner._prefix, inner._slots, inner._after = self._prefix + prefix, self._slots, self._after
        return inner

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the compute dtype, if no other is asked for."""
        return torch.empty(shape, dtype=dtype or self._dtype, device=self._device)

    def put(self, name: str, place: Tensor, shape: Sequence[int] | None = None) -> None:
        """The tensor of that name goes into ``place``; ``shape`` is its own, where that is another."""
        self._slots[self._prefix + name] = _Slot(place, torch.Size(shape or place.shape))

    def alone(self, name: str, shape: tuple[int, ...]) -> Tensor:
        weight = self.empty(*shape)
        self.put(name, weight)
        return weight

    def norm(self, name: str, *shape: int, plus_one: bool = False) -> Tensor:
        """The weight of a norm; with ``plus_one`` 1 + w in float32, as it would not be the same in fewer bits."""
        weight = self.empty(*shape, dtype=torch.float32 if plus_one else None)
        self.put(f"{name}.weight", weight)
        if plus_one:
            self.then(lambda: weight.add_(1.0))
        return weight

    def group(self, group: ProjectionGroup) -> FrozenLinear:
        """Projections as one matrix, whose rows are theirs one after another."""
        return self.fused(group.projections)

    def fused(self, projections: Sequence[Projection], dtype: torch.dtype | None = None) -> FrozenLinear:
        """As :meth:`group`, of projections that read the same input; ``dtype`` as in :meth:`empty`."""
        sizes = [projection.out_features for projection in projections]
        weight_OI = self.empty(sum(sizes), projections[0].in_features, dtype=dtype)
        bias_O = self.empty(sum(sizes), dtype=dtype) if projections[0].bias else None
        for index, (projection, part_OI) in enumerate(zip(projections, weight_OI.split(sizes), strict=True)):
            self.put(f"{projection.name}.weight", part_OI)
            if bias_O is not None:
                self.put(f"{projection.name}.bias", bias_O.split(sizes)[index])
        return FrozenLinear(weight_OI, bias_O)

    def experts(self, each: Sequence[Sequence[Projection]]) -> list[FrozenLinear]:
        """As :meth:`fused`, of every expert."""
        return [self.fused(projections) for projections in each]

    def stacked_experts(self, name: str, each: Sequence[Sequence[Projection]]) -> list[FrozenLinear]:
        """As :meth:`experts`, out of one tensor (E, in, out) where the columns of P projections take turns, and of
        ``*_bias`` (E, out)."""
        num, parts, first = len(each), len(each[0]), each[0][0]
        weight_EPOI = self.empty(num, parts, first.out_features, first.in_features)
        bias_EPO = self.empty(num, parts, first.out_features)
        columns = parts * first.out_features
        self.put(name, weight_EPOI.permute(0, 3, 2, 1), (num, first.in_features, columns))
        self.put(f"{name}_bias", bias_EPO.transpose(1, 2), (num, columns))
        return [FrozenLinear(*own) for own in zip(weight_EPOI.flatten(1, 2), bias_EPO.flatten(1), strict=True)]

    def then(self, act: Callable[[], object]) -> None:
        """Once all is filled in."""
        self._after.append(act)

    def fill(self, source: TensorSource) -> None:
        """Copy each place's tensor out of the source.

        Raises:
            OperationFailed: tensors are missing, misshapen or of no floating-point type.
        """
        absent = sorted(self._slots.keys() - set(source.names()))
        if absent:
            raise OperationFailed(f"the weights lack {len(absent)} tensors, e.g. {absent[:3]}")
        for name, tensor in source.read(self._slots.keys()):
            _copy(name, tensor, self._slots[name])
        for act in self._after:
            act()


def _copy(name: str, source: Tensor, slot: _Slot) -> None:
    if source.shape != slot.shape:
        raise OperationFailed(f"{name} has shape {list(source.shape)}, expected {list(slot.shape)}")
    if not source.is_floating_point():
        raise OperationFailed(f"{name} is {source.dtype}; quantized base weights are not supported")
    slot.place.copy_(source.reshape(slot.place.shape))
