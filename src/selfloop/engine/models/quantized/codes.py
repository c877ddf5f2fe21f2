"""Frozen weights that stay small numbers with scales in memory: what ``--base-dtype`` makes of a weight W (out, in).

int8, by rows: s_o = max_i |w_oi| / 127, q_oi = round(w_oi / s_o), and the weight that is computed with is w' = q s
(Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2).

nf4, by rows in blocks b of 64: a_ob = max |w| of the block, q = the number k whose t_k is nearest to w / a_ob, and
w' = t_q a_ob, with the sixteen t of NormalFloat: quantiles of a normal distribution, scaled to [-1, 1], one of them 0
(QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E). The a_ob are float32: 4.5
bits a weight. bitsandbytes cuts its blocks out of the flat weight, which is the same wherever rows are whole blocks.

Quantised once more, w' of either form keeps all its numbers q and, in nf4, its scales.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from selfloop.engine.models.spec import ModelSpec
from selfloop.types.settings import KeptAs

INT8_MOST = 127
NF4_BLOCK = 64
# As published in appendix E and in bitsandbytes.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Elements whose float32 copies are there at once while a weight is quantised.
_CHUNK_ELEMENTS = 2**22


class Codes(Protocol):
    """Numbers and scales of a weight (out, in), or the places for them."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def num_bytes(self) -> int: ...

    def rows(self, rows: slice) -> Self:
        """Those of some rows: the same memory."""
        ...

    def columns(self, columns: slice) -> Self:
        """Those of some columns, whose slice begins at a multiple of ``NF4_BLOCK`` and ends at one or at the end."""
        ...

    def copy_(self, other: Self) -> None:
        """Take numbers and scales as they are."""
        ...

    def quantize_(self, weight_OI: Tensor) -> None:
        """Take a weight of any floating-point type, which is finite."""
        ...

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(out, in): computed in float32 and rounded once."""
        ...


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Numbers (O, I) and a float32 scale of each row."""

    numbers_OI: Tensor
    scales_O: Tensor

    @classmethod
    def empty(cls, out_features: int, in_features: int, device: torch.device) -> Self:
        numbers_OI = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        return cls(numbers_OI, torch.empty(out_features, dtype=torch.float32, device=device))

    @property
    def shape(self) -> tuple[int, int]:
        return self.numbers_OI.shape[0], self.numbers_OI.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.numbers_OI.nbytes + self.scales_O.nbytes

    def rows(self, rows: slice) -> Self:
        return type(self)(self.numbers_OI[rows], self.scales_O[rows])

    def columns(self, columns: slice) -> Self:
        return type(self)(self.numbers_OI[:, columns], self.scales_O)

    def copy_(self, other: Self) -> None:
        self.numbers_OI.copy_(other.numbers_OI)
        self.scales_O.copy_(other.scales_O)

    def quantize_(self, weight_OI: Tensor) -> None:
        for rows in _row_chunks(weight_OI):
            part_CI = weight_OI[rows].to(self.scales_O.device, torch.float32)
            scales_C = part_CI.abs().amax(1) / INT8_MOST
            self.scales_O[rows] = scales_C
            self.numbers_OI[rows] = (part_CI / _divisors(scales_C)[:, None]).round().to(torch.int8)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.numbers_OI.to(torch.float32).mul_(self.scales_O[:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class Nf4Blocks:
    """Bytes (O, B, 32) of two numbers each, the first in the upper half, and a float32 scale of each block (O, B).

    A last block that ``in_features`` does not fill ends in numbers of 0.
    """

    bytes_OBP: Tensor
    absmax_OB: Tensor
    in_features: int

    @classmethod
    def empty(cls, out_features: int, in_features: int, device: torch.device) -> Self:
        num = -(-in_features // NF4_BLOCK)
        bytes_OBP = torch.empty(out_features, num, NF4_BLOCK // 2, dtype=torch.uint8, device=device)
        return cls(bytes_OBP, torch.empty(out_features, num, dtype=torch.float32, device=device), in_features)

    @property
    def shape(self) -> tuple[int, int]:
        return self.bytes_OBP.shape[0], self.in_features

    @property
    def num_bytes(self) -> int:
        return self.bytes_OBP.nbytes + self.absmax_OB.nbytes

    def rows(self, rows: slice) -> Self:
        return type(self)(self.bytes_OBP[rows], self.absmax_OB[rows], self.in_features)

    def columns(self, columns: slice) -> Self:
        start, stop, _ = columns.indices(self.in_features)
        blocks = slice(start // NF4_BLOCK, -(-stop // NF4_BLOCK))
        return type(self)(self.bytes_OBP[:, blocks], self.absmax_OB[:, blocks], stop - start)

    def copy_(self, other: Self) -> None:
        self.bytes_OBP.copy_(other.bytes_OBP)
        self.absmax_OB.copy_(other.absmax_OB)

    def quantize_(self, weight_OI: Tensor) -> None:
        device = self.absmax_OB.device
        table = torch.tensor(NF4_TABLE, device=device)
        borders = (table[1:] + table[:-1]) / 2
        for rows in _row_chunks(weight_OI):
            part_CI = weight_OI[rows].to(device, torch.float32)
            part_CBN = F.pad(part_CI, (0, -part_CI.shape[1] % NF4_BLOCK)).unflatten(1, (-1, NF4_BLOCK))
            absmax_CB = part_CBN.abs().amax(2)
            self.absmax_OB[rows] = absmax_CB
            numbers_CBN = torch.bucketize(part_CBN / _divisors(absmax_CB)[..., None], borders, out_int32=True)
            first_CBP, second_CBP = numbers_CBN.to(torch.uint8).unflatten(2, (-1, 2)).unbind(3)
            self.bytes_OBP[rows] = (first_CBP << 4) | second_CBP

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        pairs = _nf4_pairs(self.bytes_OBP.device)
        values = pairs.index_select(0, self.bytes_OBP.flatten().to(torch.int32)).view(torch.float32)
        values_OBN = values.view(*self.absmax_OB.shape, NF4_BLOCK)
        weight_OI = values_OBN.mul_(self.absmax_OB[..., None]).flatten(1)[:, : self.in_features]
        return weight_OI.to(dtype)


FORMS: dict[KeptAs, Callable[[int, int, torch.device], "Int8Rows | Nf4Blocks"]] = {
    "int8": Int8Rows.empty,
    "nf4": Nf4Blocks.empty,
}
"""Places for a weight (out, in) on a device, by the name of the form."""

_META = torch.device("meta")


def work_bytes(num_elements: int) -> int:
    """The most that :meth:`Codes.dequantized` of so many elements takes at a time, its result included.

    A float32 copy, and beside it two bytes of an element: half an int32 number, or the weight in bfloat16.
    """
    return num_elements * (torch.float32.itemsize + torch.bfloat16.itemsize)


def weights_bytes(spec: ModelSpec, dtype: torch.dtype, kept_as: KeptAs | None) -> int:
    """Base weights in ``dtype``, those of the layers' adaptable projections kept in a form of fewer bits."""
    total = spec.num_parameters * dtype.itemsize
    if kept_as is None:
        return total
    groups = [group for layer in spec.layers for group in layer.groups]
    shapes = [(each.out_features, each.in_features) for group in groups for each in group.projections]
    each = {
        shape: FORMS[kept_as](*shape, _META).num_bytes - shape[0] * shape[1] * dtype.itemsize for shape in {*shapes}
    }
    return total + sum(each[shape] for shape in shapes)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """What both numbers of each byte stand for, two float32 in the place of a float64: looked up at once (256)."""
    table, both = torch.tensor(NF4_TABLE, device=device), torch.arange(256, device=device)
    return torch.stack((table[both >> 4], table[both & 0x0F]), dim=1).view(torch.float64).flatten()


def _row_chunks(weight_OI: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // weight_OI.shape[1])
    return [slice(start, start + rows) for start in range(0, weight_OI.shape[0], rows)]


def _divisors(scales: Tensor) -> Tensor:
    """The scales, and 1 for those of zeros alone."""
    return torch.where(scales == 0, 1.0, scales)
