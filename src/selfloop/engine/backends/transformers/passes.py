"""Passes of a model of transformers over rows without padding: packed in one row, or padded to a rectangle."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from selfloop.engine.backends.base import Varlen
from selfloop.engine.backends.device import default_train_budget
from selfloop.engine.backends.transformers.adapted import AdapterPlaces
from selfloop.engine.backends.transformers.cache import Group
from selfloop.engine.backends.transformers.masks import PackedRows, packed_rows
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.train.batch import pack

Layout = Literal["packed", "padded", "alone"]

PADDED_FACTOR = 2
"""Rows of a padded pass are at most so many times those that count."""


class Inputs(NamedTuple):
    """What goes into the decoder: ids and positions (B, N), a mask (B, L) of what is no padding, earlier tokens too."""

    ids_BN: Tensor
    positions_BN: Tensor
    mask_BL: Tensor


class Passes:
    """The decoder of a model, with adapters."""

    def __init__(self, decoder: Any, config: PreTrainedConfig, places: AdapterPlaces) -> None:
        self._decoder = decoder
        self.config = config
        self.places = places

    def parameters(self) -> Iterator[Tensor]:
        """The decoder's weights."""
        return self._decoder.parameters()

    def modules(self) -> Iterator[nn.Module]:
        """The decoder's parts."""
        return self._decoder.modules()

    def hidden(
        self, inputs: Inputs, lora: AdapterBatch, cache: DynamicCache | None = None, *, recompute: bool = False
    ) -> Tensor:
        """h (B, N, D); ``lora`` counts the B * N rows."""
        num_rows, width = inputs.ids_BN.numel(), inputs.ids_BN.shape[1]
        of_sequences = None if cache is None else lora.of_rows(num_rows)[::width]
        with self.places.of(lora, num_rows, recompute=recompute, of_sequences=of_sequences):
            out = self._decoder(
                input_ids=inputs.ids_BN,
                position_ids=inputs.positions_BN,
                attention_mask=inputs.mask_BL,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return out.last_hidden_state

    def whole(self, layout: Layout, batch: Varlen, lora: AdapterBatch, *, recompute: bool = False) -> Tensor:
        """h_TD of whole sequences."""
        if len(batch.lengths) == 1:
            ids_1N = batch.tokens_T[None]
            inputs = Inputs(ids_1N, batch.positions_T[None], torch.ones_like(ids_1N))
            return self.hidden(inputs, lora, recompute=recompute)[0]
        assert layout != "alone", "sequences come one a call"
        if layout == "packed":
            return self._packed(batch, lora, recompute=recompute)
        return self._padded(batch, lora, recompute=recompute)

    def read(self, tokens_N: Tensor, group: Group, adapter: Adapter | None) -> Tensor:
        """h_ND of the next tokens of a group's only row, which join its cache."""
        start, num, device = group.width, tokens_N.shape[0], tokens_N.device
        positions_1N = torch.arange(start, start + num, device=device)[None]
        mask_1L = torch.ones(1, start + num, dtype=torch.int64, device=device)
        lora = AdapterBatch.of([(num, adapter)])
        h_1ND = self.hidden(Inputs(tokens_N[None], positions_1N, mask_1L), lora, group.cache)
        group.lengths, group.width = [start + num], start + num
        return h_1ND[0]

    def step(self, tokens_B: Tensor, group: Group, lora: AdapterBatch) -> Tensor:
        """h_BD of the next token of each row of a group."""
        lengths_B = torch.tensor(group.lengths, device=tokens_B.device)
        places_L = torch.arange(group.width + 1, device=tokens_B.device)
        mask_BL = (places_L >= group.width - lengths_B[:, None]).long()
        h_B1D = self.hidden(Inputs(tokens_B[:, None], lengths_B[:, None], mask_BL), lora, group.cache)
        group.lengths, group.width = [length + 1 for length in group.lengths], group.width + 1
        return h_B1D[:, 0]

    def _packed(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool) -> Tensor:
        """As many sequences at a time as a mask, which is as high as it is wide, should have."""
        adapters, starts = lora.of_rows(sum(batch.lengths)), _starts(batch.lengths)
        most = default_train_budget(batch.tokens_T.device)
        tokens, found = batch.tokens_T.split(batch.lengths), list[Tensor]()
        for part in pack(batch.lengths, most):
            lengths = [batch.lengths[index] for index in part]
            own = AdapterBatch.of([(batch.lengths[index], adapters[starts[index]]) for index in part])
            rows = Varlen.whole(torch.cat([tokens[index] for index in part]), lengths)
            found.append(self._in_one_row(rows, own, recompute=recompute))
        return torch.cat(found)

    def _in_one_row(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool) -> Tensor:
        if len(batch.lengths) == 1:
            return self.whole("alone", batch, lora, recompute=recompute)
        lengths_S, device = torch.tensor(batch.lengths), batch.tokens_T.device
        sequences_T = torch.arange(len(batch.lengths)).repeat_interleave(lengths_S).to(device)
        ids_1T, positions_T = batch.tokens_T[None], batch.positions_T
        inputs = Inputs(ids_1T, positions_T[None], torch.ones_like(ids_1T))
        with packed_rows(PackedRows(sequences_T, positions_T)):
            return self.hidden(inputs, lora, recompute=recompute)[0]

    def _padded(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool) -> Tensor:
        """Sequences of like lengths at a time, padded on the right, where no earlier token looks."""
        adapters = lora.of_rows(sum(batch.lengths))
        tokens, starts = batch.tokens_T.split(batch.lengths), _starts(batch.lengths)
        found: list[Tensor] = [batch.tokens_T] * len(batch.lengths)
        for part in _alike(batch.lengths):
            ids_BN = pad_sequence([tokens[index] for index in part], batch_first=True)
            num = ids_BN.shape[1]
            positions_N = torch.arange(num, device=ids_BN.device)
            lengths_B = torch.tensor([batch.lengths[index] for index in part], device=ids_BN.device)
            mask_BN = (positions_N < lengths_B[:, None]).long()
            own = AdapterBatch.of([(num, adapters[starts[index]]) for index in part])
            h_BND = self.hidden(Inputs(ids_BN, positions_N.expand_as(ids_BN), mask_BN), own, recompute=recompute)
            for index, h_ND in zip(part, h_BND, strict=True):
                found[index] = h_ND[: batch.lengths[index]]
        return torch.cat(found)


def in_blocks(batch: Varlen, lora: AdapterBatch) -> list[tuple[Varlen, AdapterBatch]] | None:
    """Each run's sequences with its adapter, where they are to be computed by themselves."""
    if lora.blocks is None or len(lora.blocks) == 1:
        return None
    parts: list[tuple[Varlen, AdapterBatch]] = []
    first = 0
    for row, tokens_N in zip(lora.rows, batch.tokens_T.split(lora.blocks), strict=True):
        stop, left = first, row.stop - row.start
        while left > 0:
            left -= batch.lengths[stop]
            stop += 1
        assert left == 0, "a sequence is of one run"
        own = AdapterBatch.of([(row.stop - row.start, row.adapter)])
        parts.append((Varlen.whole(tokens_N, batch.lengths[first:stop]), own))
        first = stop
    return parts


def _starts(lengths: Sequence[int]) -> list[int]:
    starts, at = list[int](), 0
    for length in lengths:
        starts.append(at)
        at += length
    return starts


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups, the longest of which is at most ``PADDED_FACTOR`` times the shortest."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or lengths[index] * PADDED_FACTOR < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return [sorted(group) for group in groups]
