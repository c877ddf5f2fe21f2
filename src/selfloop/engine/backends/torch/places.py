"""Where each named tensor of a checkpoint goes: a slice of an allocated weight."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.quantized_linear import QuantizedLinear
from selfloop.engine.models.quantized.codes import FORMS, Codes
from selfloop.engine.models.spec import Projection, ProjectionGroup
from selfloop.engine.models.weights import TensorSource
from selfloop.types.errors import OperationFailed
from selfloop.types.settings import KeptAs

log = logging.getLogger("selfloop.engine")


class _Slot(NamedTuple):
    place: Tensor
    shape: torch.Size


class Places:
    """Weights allocated by name on a device, to be filled out of a source.

    Args:
        kept_as: the form of matrices that take adapters; None for the compute type, which all else is in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None) -> None:
        self._device = device
        self._dtype = dtype
        self._kept_as: KeptAs | None = kept_as
        self._prefix = ""
        self._slots: dict[str, _Slot] = {}
        self._codes: dict[str, Codes] = {}
        self._after: list[Callable[[], object]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def inside(self, prefix: str) -> "Places":
        """The same places, for names that begin with ``prefix``."""
        inner = Places(self._device, self._dtype, self._kept_as)
        inner._prefix = self._prefix + prefix
        inner._slots, inner._codes, inner._after = self._slots, self._codes, self._after
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
        sizes, inner = [projection.out_features for projection in projections], projections[0].in_features
        bias_O = self.empty(sum(sizes), dtype=dtype) if projections[0].bias else None
        if bias_O is not None:
            for projection, part_O in zip(projections, bias_O.split(sizes), strict=True):
                self.put(f"{projection.name}.bias", part_O)
        if self._kept_as is not None and projections[0].adaptable:
            codes, start = FORMS[self._kept_as](sum(sizes), inner, self._device), 0
            for projection in projections:
                stop = start + projection.out_features
                self._codes[f"{self._prefix}{projection.name}.weight"] = codes.rows(slice(start, stop))
                start = stop
            return QuantizedLinear(codes, sum(sizes), inner, bias_O, self._device)
        weight_OI = self.empty(sum(sizes), inner, dtype=dtype)
        for projection, part_OI in zip(projections, weight_OI.split(sizes), strict=True):
            self.put(f"{projection.name}.weight", part_OI)
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
            OperationFailed: tensors are missing, misshapen or of no floating-point type, or cannot be quantised.
        """
        absent = sorted((self._slots.keys() | self._codes.keys()) - set(source.names()))
        if absent:
            raise OperationFailed(f"the weights lack {len(absent)} tensors, e.g. {absent[:3]}")
        stored = self._fill_codes(source)
        for name, tensor in source.read([*self._slots, *(self._codes.keys() - stored)]):
            if name in self._slots:
                _copy(name, tensor, self._slots[name])
            else:
                _quantize(name, tensor, self._codes[name])
        for act in self._after:
            act()

    def _fill_codes(self, source: TensorSource) -> set[str]:
        """Take what is stored as it is kept; names of that."""
        if self._kept_as is None:
            return set()
        stored: set[str] = set()
        for name, codes in source.codes(self._codes.keys(), self._kept_as):
            _check_shape(name, codes.shape, self._codes[name].shape)
            self._codes[name].copy_(codes)
            stored.add(name)
        log.info(
            "%d matrices are kept in %s: %d by the numbers that they are stored as, the others quantised from their "
            "values; embedding, output layer, norms and routers are in %s",
            len(self._codes),
            self._kept_as,
            len(stored),
            self._dtype,
        )
        return stored


def _copy(name: str, source: Tensor, slot: _Slot) -> None:
    _check_shape(name, source.shape, slot.shape)
    _check_type(name, source)
    slot.place.copy_(source.reshape(slot.place.shape))


def _quantize(name: str, source: Tensor, place: Codes) -> None:
    _check_shape(name, source.shape, place.shape)
    _check_type(name, source)
    if not bool(source.isfinite().all()):
        raise OperationFailed(f"{name} has values that are not finite, and cannot be quantised")
    place.quantize_(source)


def _check_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise OperationFailed(f"{name} has shape {list(found)}, expected {list(expected)}")


def _check_type(name: str, source: Tensor) -> None:
    if not source.is_floating_point():
        raise OperationFailed(f"{name} is {source.dtype}, expected a floating-point type".replace("torch.", ""))
