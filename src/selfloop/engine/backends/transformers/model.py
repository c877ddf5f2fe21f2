"""A causal language model of transformers behind the engine's Protocol."""

import torch
import transformers
from torch import Tensor

from selfloop.engine.backends.base import Cache, CacheSlot, Contracts, Costs, Draw, Row, Scores, Varlen
from selfloop.engine.backends.cpu_native.draw import draw
from selfloop.engine.backends.device import default_kv_tokens
from selfloop.engine.backends.transformers.cache import Group, TransformersCache, new_cache
from selfloop.engine.backends.transformers.costs import costs_of
from selfloop.engine.backends.transformers.head import ModelHead
from selfloop.engine.backends.transformers.passes import Passes, in_blocks
from selfloop.engine.backends.transformers.self_test import Findings
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.spec import ModelSpec
from selfloop.types.settings import KeptAs


class TransformersModel:
    """Whatever transformers computes; how batches are laid out is what the self-test found to be exact."""

    kept_as: KeptAs | None = None

    def __init__(
        self, spec: ModelSpec, passes: Passes, head: ModelHead, findings: Findings, name: str, dtype: torch.dtype
    ) -> None:
        self.spec: ModelSpec = spec
        self.passes = passes
        self.head = head
        self.findings = findings
        self.device = head.linear.plain().device
        self.dtype = dtype
        self.contracts = Contracts(paged=False, prefixes=False, packed=findings.layout != "alone")
        self.computed_by = f"transformers {transformers.__version__} ({name}), {findings.layout}"
        self._costs: Costs | None = None

    def forward(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool = False) -> Tensor:
        parts = in_blocks(batch, lora)
        if parts is None:
            return self.passes.whole(self.findings.layout, batch, lora, recompute=recompute)
        return torch.cat([self.forward(own, adapters, recompute=recompute) for own, adapters in parts])

    def forward_cached(self, batch: Varlen, cache: Cache, lora: AdapterBatch) -> Tensor:
        assert isinstance(cache, TransformersCache)
        with torch.no_grad():
            if batch.slots[0].grows:
                return self._decode(batch, cache, lora)
            adapters, row = lora.of_rows(sum(batch.lengths)), 0
            parts: list[Tensor] = []
            for index, tokens_N in enumerate(batch.tokens_T.split(batch.lengths)):
                start, slot = batch.starts[index], batch.slots[index]
                parts.append(self._prefill(tokens_N, start, slot, cache, adapters[row]))
                row += batch.lengths[index]
            return torch.cat(parts)

    def score(self, h_ND: Tensor, targets: Tensor, num_top: int, adapter: Adapter | None) -> Scores:
        return self.head.score(h_ND, targets, num_top, adapter)

    def logits(self, h_ND: Tensor, lora: AdapterBatch) -> Tensor:
        with torch.no_grad():
            return self.head.logits(h_ND, lora)

    def draw(self, logits_BV: Tensor, rows: list[Row], num_tokens: int) -> Draw:
        return draw(logits_BV, rows, num_tokens)

    def make_cache(self, num_tokens: int | None) -> TransformersCache:
        findings, token_bytes = self.findings, max(1, self.findings.token_bytes)
        if num_tokens is None:
            num_tokens = default_kv_tokens(token_bytes, self.spec.context, self.device)
        config = self.passes.config
        return TransformersCache(config, num_tokens, token_bytes, findings.state_bytes, padded=findings.pads)

    def costs(self) -> Costs:
        if self._costs is None:
            self._costs = costs_of(self)
        return self._costs

    def _prefill(
        self, tokens_N: Tensor, start: int, slot: CacheSlot, cache: TransformersCache, adapter: Adapter | None
    ) -> Tensor:
        group = cache.prompt(slot, start)
        if not self.findings.continues:
            # A part that does not go on from what is cached is read once more from the prompt's start.
            known = [*group.tokens, *tokens_N.tolist()]
            group = Group(new_cache(self.passes.config), [0], 0, tokens=known)
            cache.replace(slot, group)
            h_LD = self.passes.read(torch.tensor(known, device=self.device), group, adapter)
            return h_LD[start:]
        return self.passes.read(tokens_N, group, adapter)

    def _decode(self, batch: Varlen, cache: TransformersCache, lora: AdapterBatch) -> Tensor:
        adapters = lora.of_rows(len(batch.slots))
        found: list[Tensor] = [batch.tokens_T] * len(batch.slots)
        for part in cache.groups(batch.slots):
            group = cache.together([batch.slots[index] for index in part])
            assert group.lengths == [batch.starts[index] for index in part], "a sequence missed a step"
            places_B = torch.tensor(part, device=self.device)
            own = AdapterBatch.of([(1, adapters[index]) for index in part])
            for index, h_D in zip(part, self.passes.step(batch.tokens_T[places_B], group, own), strict=True):
                found[index] = h_D
        return torch.stack(found)
