"""What a model keeps apart, found out at load on this very model: the engine believes nothing of a family's name.

Nine of 35 families mix sequences that lie in one row without a word. So three sequences are computed each alone, packed
in one row and padded to a rectangle, one of them with an adapter; where another's tokens show, or the numbers are not
those of the sequence alone, that layout is not used.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.transformers.cache import Group, TransformersCache, cache_bytes, can_merge, new_cache
from selfloop.engine.backends.transformers.passes import Layout, Passes
from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.stored import StoredSpec
from selfloop.types.errors import model_invalid
from selfloop.types.lora import LoraTargets

log = logging.getLogger("selfloop.engine")

_LENGTHS = (7, 13, 5)
# Attributes that hold a position from which on attention is scaled, by places in the batch and not by position ids.
_FROM_POSITION, _EARLY = ("floor_scale",), 3
_ADAPTED = 1
_RANK, _SPREAD = 2, 0.05
# Of the root of the mean square of hidden states. A recurrence that leaks differs by 1e-2 and more.
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float64: 1e-6}
# Deep models round more: so many times what the same sequence differs by in passes of two lengths.
_NOISES = 4
# Of another sequence's tokens in the same row nothing may show.
_TRACES = {torch.float32: 1e-5, torch.bfloat16: 0.0, torch.float64: 1e-9}


class Findings(NamedTuple):
    """How a model is to be used.

    Args:
        layout: of several sequences in one pass.
        continues: whether a prompt's part can follow another through the cache.
        pads: whether sequences of several lengths can take their steps together, the shorter ones padded.
        token_bytes: what the cache takes for each token.
        state_bytes: and for each sequence besides.
    """

    layout: Layout
    continues: bool
    pads: bool
    token_bytes: int
    state_bytes: int


def self_test(spec: StoredSpec, passes: Passes, dtype: torch.dtype, device: torch.device) -> Findings:
    """Try the model; the log says what came out, and why.

    Raises:
        OperationFailed: it is no causal model, adapters do not go where they should, or its cache is not exact.
    """
    with torch.no_grad(), _within_reach(passes):
        return _SelfTest(spec, passes, dtype, device).run()


@contextmanager
def _within_reach(passes: Passes) -> Generator[None]:
    """What a model does from some position on, it does meanwhile from the first few on: the test is of short ones."""
    before = [
        (module, name, getattr(module, name))
        for module in passes.modules()
        for name in _FROM_POSITION
        if isinstance(getattr(module, name, None), int)
    ]
    for module, name, _ in before:
        setattr(module, name, _EARLY)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _SelfTest:
    def __init__(self, spec: StoredSpec, passes: Passes, dtype: torch.dtype, device: torch.device) -> None:
        self._passes = passes
        self._bound, self._trace = _BOUNDS[dtype], _TRACES[dtype]
        self._name = spec.model_type
        shape = AdapterShape(spec, _RANK, LoraTargets(attn=True, mlp=True))
        generator = torch.Generator().manual_seed(0)
        flat_P = _SPREAD * torch.randn(shape.num_parameters, generator=generator)
        self._adapter = shape.adapter(flat_P.to(device, dtype), alpha=1.0)
        num = sum(_LENGTHS)
        ids_T = (2 * torch.arange(num) + 1) * spec.vocab_size // (2 * num)
        self._tokens = list(ids_T[torch.randperm(num, generator=generator)].to(device).split(_LENGTHS))

    def run(self) -> Findings:
        alone = [self._whole("alone", [index]) for index in range(len(_LENGTHS))]
        self._check_adapters()
        self._check_causal(alone[0])
        self._bound = max(self._bound, _NOISES * self._noise(alone[_ADAPTED]))
        layout, why = self._layout(alone)
        continues, pads = self._check_cache(alone)
        short, longer = (self._prompt(0, num) for num in (_LENGTHS[0] - 1, _LENGTHS[0]))
        token_bytes, state_bytes = cache_bytes(short.cache, longer.cache, 1)
        log.info("self-test of %s: %s: %s", self._name, layout, why)
        if not continues:
            log.info("self-test of %s: parts of a prompt do not go on: each is read from its start", self._name)
        return Findings(layout, continues, pads, token_bytes, state_bytes)

    def _layout(self, alone: list[Tensor]) -> tuple[Layout, str]:
        why = ""
        for layout in ("packed", "padded"):
            difference, trace = self._compare(layout, alone)
            if difference <= self._bound and trace <= (self._trace if layout == "packed" else self._bound):
                return layout, f"{why}three sequences equal each alone within {difference:.1e}"
            why += f"{layout} they differ from each alone by {difference:.1e}, another's tokens show by {trace:.1e}; "
        return "alone", why + "each has a pass of its own"

    def _compare(self, layout: Layout, alone: list[Tensor]) -> tuple[float, float]:
        """How far a layout is from each sequence alone, and how much the others change when the first has other ids."""
        every = list(range(len(_LENGTHS)))
        together = self._whole(layout, every)
        self._tokens[0] = self._tokens[0].flip(0)
        changed = self._whole(layout, every)
        self._tokens[0] = self._tokens[0].flip(0)
        rest = slice(_LENGTHS[0], None)
        return _distance(together, torch.cat(alone)), _distance(together[rest], changed[rest])

    def _whole(self, layout: Layout, indices: list[int]) -> Tensor:
        lengths = [_LENGTHS[index] for index in indices]
        batch = Varlen.whole(torch.cat([self._tokens[index] for index in indices]), lengths)
        lora = AdapterBatch.of([(_LENGTHS[index], self._adapter_of(index)) for index in indices])
        return self._passes.whole(layout, batch, lora)

    def _adapter_of(self, index: int) -> Adapter | None:
        return self._adapter if index == _ADAPTED else None

    def _check_adapters(self) -> None:
        places = self._passes.places
        missed = sorted(places.names - places.seen)
        if missed:
            raise model_invalid(f"{len(missed)} linear layers of {self._name} take no part, e.g. {missed[:3]}")

    def _check_causal(self, first_ND: Tensor) -> None:
        own_N = self._tokens[0]
        self._tokens[0] = torch.cat((own_N[:-1], self._tokens[1][:1]))
        changed_ND = self._whole("alone", [0])
        self._tokens[0] = own_N
        if _distance(first_ND[:-1], changed_ND[:-1]) > self._bound or torch.equal(first_ND[-1], changed_ND[-1]):
            raise model_invalid(f"{self._name} is no causal language model: an earlier token sees a later one")

    def _noise(self, longer_ND: Tensor) -> float:
        """How far the numbers of a sequence are from those it has as the start of a longer one: all of it rounding."""
        num = _LENGTHS[_ADAPTED] // 2
        return _distance(self._start(_ADAPTED, num), longer_ND[:num])

    def _check_cache(self, alone: list[Tensor]) -> tuple[bool, bool]:
        """Whether prompts can be read in parts, and whether steps of unlike lengths can be padded.

        Raises OperationFailed where not even sequences of one length decode together.
        """
        pads = can_merge(self._passes.config)
        distance = self._decoded(list(_LENGTHS))
        if not pads:
            log.info("self-test of %s: each sequence decodes with a cache of its own", self._name)
        pads = pads and distance <= self._bound
        if distance > self._bound:
            log.info("self-test of %s: steps that are padded differ from the whole by %.1e", self._name, distance)
            if (distance := self._decoded([min(_LENGTHS)] * len(_LENGTHS))) > self._bound:
                raise model_invalid(f"decoding {self._name} through its cache differs from the whole by {distance:.1e}")
        longest = _LENGTHS.index(max(_LENGTHS))
        begun = self._prompt(longest, _LENGTHS[longest] // 2)
        rest_N = self._tokens[longest][_LENGTHS[longest] // 2 :]
        h_ND = self._passes.read(rest_N, begun, self._adapter_of(longest))
        return _distance(h_ND, alone[longest][-rest_N.shape[0] :]) <= self._bound, pads

    def _decoded(self, lengths: list[int]) -> float:
        """How far the last of so many tokens of each sequence, in one step together, is from the whole sequence's."""
        cache = TransformersCache(self._passes.config, sum(lengths), 1, 0, padded=True)
        slots = [CacheSlot([], grows=True) for _ in lengths]
        for index, slot in enumerate(slots):
            cache.replace(slot, self._prompt(index, lengths[index] - 1))
        last_B = torch.stack([tokens[n - 1] for tokens, n in zip(self._tokens, lengths, strict=True)])
        found: list[Tensor] = []
        for part in [list(range(len(slots)))] if cache.merges else cache.groups(slots):
            lora = AdapterBatch.of([(1, self._adapter_of(index)) for index in part])
            group = cache.together([slots[index] for index in part])
            found.append(self._passes.step(last_B[part], group, lora))
        expected = [self._start(index, num)[-1] for index, num in enumerate(lengths)]
        return _distance(torch.cat(found), torch.stack(expected))

    def _start(self, index: int, num: int) -> Tensor:
        """h_ND of a sequence's first tokens, alone."""
        lora = AdapterBatch.of([(num, self._adapter_of(index))])
        return self._passes.whole("alone", Varlen.whole(self._tokens[index][:num], [num]), lora)

    def _prompt(self, index: int, num: int) -> Group:
        group = Group(new_cache(self._passes.config), [0], 0)
        self._passes.read(self._tokens[index][:num], group, self._adapter_of(index))
        return group


def _distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the row that differs most, as a part of that of all."""
    rows_N = (found.float() - expected.float()).square().mean(-1).sqrt()
    return float(rows_N.max() / expected.float().square().mean().sqrt())
