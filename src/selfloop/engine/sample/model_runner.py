"""The model over its cache: a pass for parts of prompts, a pass for one new token of each running sample."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import Cache, CacheSlot, Model, Varlen
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.routing import Recording
from selfloop.engine.sample.route_log import RouteLog
from selfloop.engine.sample.sequence import Sample
from selfloop.engine.vision.rows import Part, layout
from selfloop.engine.vision.sight import SeenImage


class PromptChunk(NamedTuple):
    """Tokens [start, stop) of a prompt whose cache is ``slot``; what is before ``start`` is cached.

    ``routes`` notes the experts that they go to.
    ``images`` are those of the whole prompt.
    """

    slot: CacheSlot
    start: int
    stop: int
    routes: RouteLog | None = None
    images: Sequence[SeenImage] = ()


class ModelRunner:
    """Builds the batches of a model and its cache."""

    def __init__(self, model: Model, num_tokens: int | None) -> None:
        """Over a cache of ``num_tokens``; None for what suits the device."""
        self.model = model
        self.cache: Cache = model.make_cache(num_tokens)

    def prefill(self, tokens: list[int], chunks: list[PromptChunk], lora: AdapterBatch) -> Tensor:
        """h_TD of chunks one after another, which join the cache."""
        slots, starts = [chunk.slot for chunk in chunks], [chunk.start for chunk in chunks]
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        recording = _recording([chunk.routes for chunk in chunks])
        laid_out = layout([Part(chunk.start, chunk.stop, chunk.images) for chunk in chunks], self.model.device)
        batch = Varlen(self._ids(tokens), lengths, starts, slots, recording, *laid_out)
        h_TD = self.model.forward_cached(batch, self.cache, lora)
        if recording is not None:
            for chunk, experts_NLK in zip(chunks, recording.experts_TLK().split(lengths), strict=True):
                if chunk.routes is not None:
                    chunk.routes.add_prompt(experts_NLK)
        return h_TD

    def decode(self, samples: Sequence[Sample]) -> Tensor:
        """float32 logits (B, V) after each sample's newest token, which joins the cache; adapters stand together."""
        lora = AdapterBatch.of([(1, sample.parent.adapter) for sample in samples])
        starts, slots = [sample.position for sample in samples], [sample.slot for sample in samples]
        tokens_B = self._ids([sample.tokens[-1] for sample in samples])
        rotary = None
        if any(sample.parent.rotary_shift for sample in samples):
            rotary = self._ids([sample.rotary_position for sample in samples])
        recording = _recording([sample.parent.routes for sample in samples])
        batch = Varlen(tokens_B, [1] * len(samples), starts, slots, recording, rotary=rotary)
        logits_BV = self.model.logits(self.model.forward_cached(batch, self.cache, lora), lora)
        if recording is not None:
            for sample, experts_LK in zip(samples, recording.experts_TLK(), strict=True):
                if sample.parent.routes is not None:
                    sample.parent.routes.add_token(sample.index, experts_LK)
        return logits_BV

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self.model.device)


def _recording(logs: Sequence[RouteLog | None]) -> Recording | None:
    """Of a pass, if any of its rows' routes are asked for."""
    mixtures = next((log.mixtures for log in logs if log is not None), None)
    return None if mixtures is None else Recording(mixtures)
