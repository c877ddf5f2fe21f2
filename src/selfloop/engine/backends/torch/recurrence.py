"""How a recurrent layer goes along the rows of a pass: which of them follow one another, and where states lie."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.torch.attention import Attention, in_blocks
from selfloop.engine.backends.torch.delta_rule import DeltaInputs, delta_rule, delta_step
from selfloop.engine.models.gated_delta_net import GatedDeltaNet

_MOST_NEW_ROWS = 64


class Recurrence(Protocol):
    """Of the packed rows of one pass; ``place`` is the number of the layer among the recurrent ones."""

    def convolve(self, place: int, x_NC: Tensor, weight_CK: Tensor) -> Tensor:
        """The causal convolution of each channel by itself, (N, C)."""
        ...

    def delta(self, place: int, inputs: DeltaInputs) -> Tensor:
        """(N, H, value dim)."""
        ...


class Mixing(NamedTuple):
    """How the rows of a pass look at one another; ``rows`` is None for a model without recurrent layers."""

    attention: Attention
    rows: Recurrence | None


class RecurrentStates:
    """States of sequences, a row for each, in float32; grows as they come."""

    def __init__(self, layers: Sequence[GatedDeltaNet], device: torch.device) -> None:
        one = layers[0]
        num = len(layers)
        self._delta_RLHkv = torch.empty(0, num, one.num_value_heads, one.key_dim, one.value_dim, device=device)
        self._tail_RLKC = torch.empty(0, num, one.kernel - 1, one.mixed_size, device=device)
        self._row: dict[CacheSlot, int] = {}
        self._free: list[int] = []

    def rows(self, slots: Sequence[CacheSlot], starts: Sequence[int]) -> Tensor:
        """int64 row of each slot; of those that start, a new one of zeros."""
        for slot, start in zip(slots, starts, strict=True):
            if start == 0:
                row = self._new(slot)
                self._delta_RLHkv[row] = 0
                self._tail_RLKC[row] = 0
        return torch.tensor([self._row[slot] for slot in slots], device=self._delta_RLHkv.device)

    def fork(self, slot: CacheSlot, into: CacheSlot) -> None:
        source, row = self._row[slot], self._new(into)
        self._delta_RLHkv[row] = self._delta_RLHkv[source]
        self._tail_RLKC[row] = self._tail_RLKC[source]

    def leave(self, slot: CacheSlot) -> None:
        row = self._row.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def delta(self, place: int, rows_S: Tensor) -> Tensor:
        return self._delta_RLHkv[rows_S, place]

    def put_delta(self, place: int, rows_S: Tensor, states_SHkv: Tensor) -> None:
        self._delta_RLHkv[rows_S, place] = states_SHkv

    def tail(self, place: int, rows_S: Tensor) -> Tensor:
        """The last rows (S, kernel - 1, C) that a convolution saw, the newest last."""
        return self._tail_RLKC[rows_S, place]

    def put_tail(self, place: int, rows_S: Tensor, tails_SKC: Tensor) -> None:
        self._tail_RLKC[rows_S, place] = tails_SKC

    def _new(self, slot: CacheSlot) -> int:
        known = self._row.get(slot)
        if known is not None:
            return known
        if not self._free:
            num = self._delta_RLHkv.shape[0]
            # Doubled while it is small, and never far beyond what is counted.
            self._free = list(range(num, num + min(max(num, 1), _MOST_NEW_ROWS)))[::-1]
            more = len(self._free)
            self._delta_RLHkv = _more_rows(self._delta_RLHkv, more)
            self._tail_RLKC = _more_rows(self._tail_RLKC, more)
        row = self._row[slot] = self._free.pop()
        return row


class PackedRecurrence:
    """Whole sequences, one after another, with nothing before them."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def convolve(self, place: int, x_NC: Tensor, weight_CK: Tensor) -> Tensor:
        return _convolve(x_NC, weight_CK, self.lengths)

    def delta(self, place: int, inputs: DeltaInputs) -> Tensor:
        return delta_rule(inputs, self.lengths)


class BatchInvariantRecurrence:
    """Blocks of rows that lie one after another, each computed as it would be alone."""

    def __init__(self, blocks: list[tuple[int, PackedRecurrence]]) -> None:
        self._sizes = [size for size, _ in blocks]
        self._blocks = [recurrence for _, recurrence in blocks]

    def convolve(self, place: int, x_NC: Tensor, weight_CK: Tensor) -> Tensor:
        parts = zip(self._blocks, x_NC.split(self._sizes), strict=True)
        return torch.cat([block.convolve(place, x_BC, weight_CK) for block, x_BC in parts])

    def delta(self, place: int, inputs: DeltaInputs) -> Tensor:
        each = zip(*(x.split(self._sizes) for x in inputs), strict=True)
        parts = zip(self._blocks, each, strict=True)
        return torch.cat([block.delta(place, DeltaInputs(*own)) for block, own in parts])


class PrefillRecurrence:
    """Parts of prompts, one after another, each of which goes on from its slot's state and leaves a newer one."""

    def __init__(self, states: RecurrentStates, batch: Varlen) -> None:
        self._states = states
        self._lengths = batch.lengths
        self._rows_S = states.rows(batch.slots, batch.starts)

    def convolve(self, place: int, x_NC: Tensor, weight_CK: Tensor) -> Tensor:
        tails_SKC = self._states.tail(place, self._rows_S)
        num = tails_SKC.shape[1]
        ends = [torch.cat((tail, x))[-num:] for tail, x in zip(tails_SKC, x_NC.split(self._lengths), strict=True)]
        self._states.put_tail(place, self._rows_S, torch.stack(ends))
        out_NC = _convolve(x_NC, weight_CK, self._lengths)
        _go_on(out_NC, x_NC, weight_CK, self._lengths, tails_SKC)
        return out_NC

    def delta(self, place: int, inputs: DeltaInputs) -> Tensor:
        states_SHkv = self._states.delta(place, self._rows_S)
        out_NHv = delta_rule(inputs, self._lengths, states_SHkv)
        self._states.put_delta(place, self._rows_S, states_SHkv)
        return out_NHv


class StepRecurrence:
    """One new token of each slot."""

    def __init__(self, states: RecurrentStates, batch: Varlen) -> None:
        self._states = states
        self._rows_B = states.rows(batch.slots, batch.starts)

    def convolve(self, place: int, x_NC: Tensor, weight_CK: Tensor) -> Tensor:
        seen_BKC = torch.cat((self._states.tail(place, self._rows_B), x_NC[:, None]), dim=1)
        self._states.put_tail(place, self._rows_B, seen_BKC[:, 1:])
        return (seen_BKC * weight_CK.t()).sum(1)

    def delta(self, place: int, inputs: DeltaInputs) -> Tensor:
        out_BHv, state_BHkv = delta_step(inputs, self._states.delta(place, self._rows_B))
        self._states.put_delta(place, self._rows_B, state_BHkv)
        return out_BHv


def packed_recurrence(lengths: list[int], blocks: list[int] | None) -> "PackedRecurrence | BatchInvariantRecurrence":
    """Of sequences that lie one after another; with ``blocks``, sizes of row blocks, each of these by itself."""
    if blocks is None:
        return PackedRecurrence(lengths)
    return BatchInvariantRecurrence([(sum(own), PackedRecurrence(own)) for own in in_blocks(lengths, blocks)])


def _convolve(x_NC: Tensor, weight_CK: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each row sees the rows before it in its sequence, as far as there are some; nothing is kept for a backward."""
    kernel = weight_CK.shape[1]
    positions_N1 = torch.cat([torch.arange(length) for length in lengths])[:, None].to(x_NC.device)
    out_NC = x_NC * weight_CK[:, -1]
    for back in range(1, kernel):
        seen_NC = torch.where(positions_N1[back:] >= back, x_NC[:-back], 0.0)
        out_NC[back:] += seen_NC * weight_CK[:, kernel - 1 - back]
    return out_NC


def _go_on(out_NC: Tensor, x_NC: Tensor, weight_CK: Tensor, lengths: Sequence[int], tails_SKC: Tensor) -> None:
    """Make the first rows of each sequence see its tail, too; in place."""
    kernel = weight_CK.shape[1]
    for tail, own_NC, into_NC in zip(tails_SKC, x_NC.split(list(lengths)), out_NC.split(list(lengths)), strict=True):
        seen = torch.cat((tail, own_NC[: kernel - 1]))
        num = len(seen) - len(tail)
        into_NC[:num] = sum(seen[tap : tap + num] * weight_CK[:, tap] for tap in range(kernel))


def _more_rows(rows: Tensor, num: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(num, *rows.shape[1:])))
