"""Continuous batching: at every step requests join, prompts are prefilled, each sample grows by a token.

A request waits until the cache has room for its prompt and one whole sample; its further samples start as
room frees, so nothing that has started ever runs out of cache. What a prompt shares with an earlier one is found
in the prefix cache; one that could share with a prompt under way waits for that.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot, Row
from selfloop.engine.backends.device import NUM_KEPT_STATES
from selfloop.engine.kv.pages import PAGE_TOKENS
from selfloop.engine.kv.prefix_cache import Found, KeptStates, PrefixCache
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.sample.grammar import CompileGrammar, Constraint, Grammar
from selfloop.engine.sample.model_runner import ModelRunner, PromptChunk
from selfloop.engine.sample.penalties import Penalties
from selfloop.engine.sample.prompt_logprobs import PromptScores
from selfloop.engine.sample.route_log import RouteLog
from selfloop.engine.sample.sampler import sample_generator
from selfloop.engine.sample.sequence import ActiveRequest, Sample, StopReason
from selfloop.engine.sample.text import SampleText, StopString, Vocabulary
from selfloop.engine.vision.sight import SeenImage
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.sampling import SampleDelta, SampleRequest, SampleResult, SamplingParams, TokenLogprob, room_after

_Item = TypeVar("_Item")
# While samples run, a step prefills this part of the budget at most.
_PARTS = 4


class SamplingScheduler:
    """Owns the KV cache and every request between submission and result."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        prefill_budget: int,
        max_batch: int,
        vocabulary: Vocabulary | None,
        compile_grammar: CompileGrammar | None,
    ) -> None:
        self._runner = runner
        self._model = runner.model
        self._cache = runner.cache
        self._pool = runner.cache.pool
        self._state_tokens = runner.model.contracts.state_tokens
        kept = None if self._state_tokens is None else KeptStates(NUM_KEPT_STATES, runner.cache.leave)
        self._prefixes = PrefixCache(self._pool, kept)
        self._prefill_budget = prefill_budget
        self._max_batch = max_batch
        self._vocabulary = vocabulary
        self._compile_grammar = compile_grammar
        spec = runner.model.spec
        vocab_size = spec.vocab_size
        self._num_tokens = vocab_size if vocabulary is None else min(vocab_size, vocabulary.num_tokens)
        self._end_tokens = frozenset(spec.eos_token_ids)
        self._waiting: deque[ActiveRequest] = deque()
        self._active: list[ActiveRequest] = []
        self._samples: list[Sample] = []
        self._failures: list[tuple[str, OperationFailed]] = []
        self._deltas: dict[str, list[SampleDelta]] = {}

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._active)

    def adapters_in_use(self) -> set[int]:
        """``id`` of every adapter that a request still needs."""
        return {id(r.adapter) for r in (*self._waiting, *self._active) if r.adapter is not None}

    def submit(
        self, request: SampleRequest, adapter: Adapter | None, *, stream: bool, images: Sequence[SeenImage] = ()
    ) -> None:
        """Queue a request. Raises BadRequest when it could never run here."""
        params = request.params
        assert request.num_samples >= 1
        assert params.max_tokens >= 1
        assert params.temperature >= 0
        assert request.prompt, "a prompt has at least one token"
        assert request.request_id not in {r.request.request_id for r in (*self._waiting, *self._active)}
        assert all(params.stop), "a stop string is not empty"
        assert request.top_logprobs >= 0
        for name, asked in (("stop", params.stop), ("token_bytes", request.token_bytes)):
            if asked and self._vocabulary is None:
                raise BadRequest(name, "this needs a tokenizer, and this engine has none")
        context = self._model.spec.context
        if params.max_tokens > room_after(len(request.prompt), context, scored=request.asks_about_prompt):
            raise BadRequest(
                "max_tokens", f"prompt ({len(request.prompt)} tokens) and max_tokens must fit {context} positions"
            )
        stops = [StopString(stop) for stop in params.stop]
        paged = self._model.contracts.paged
        active = ActiveRequest(request, adapter, stream, self._grammar(request), stops, paged=paged, images=images)
        if request.asks_about_prompt:
            active.prompt_scores = PromptScores(request, self._num_tokens, lambda token: self._raw(active, token))
        active.routes = RouteLog.of(request, self._model)
        if active.prompt_pages + active.sample_pages > self._pool.num_pages:
            raise BadRequest("max_tokens", "prompt and max_tokens exceed the KV cache of this sampler")
        self._waiting.append(active)

    def _grammar(self, request: SampleRequest) -> Grammar | None:
        structured = request.params.structured
        if structured is None:
            return None
        if self._compile_grammar is None:
            raise BadRequest("structured_outputs", "this engine compiles no grammars")
        grammar = self._compile_grammar(structured)
        if self._constraint(request, grammar).must_end:
            raise BadRequest("structured_outputs", "something that more than the empty text matches")
        return grammar

    def _constraint(self, request: SampleRequest, grammar: Grammar) -> Constraint:
        final_tokens = self._ends(request.params) | frozenset(request.params.stop_token_ids)
        return Constraint(grammar, self._model.spec.vocab_size, self._end_tokens, final_tokens)

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        return self._end_tokens if params.use_end_tokens else frozenset()

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; unknown ids are finished ones."""
        self._waiting = deque(r for r in self._waiting if r.request.request_id != request_id)
        for request in [r for r in self._active if r.request.request_id == request_id]:
            self._drop(request)

    def take_failures(self) -> list[tuple[str, OperationFailed]]:
        """Requests that ended in an error since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def take_deltas(self) -> dict[str, list[SampleDelta]]:
        """What the samples of streaming requests grew by since the last call, by request."""
        deltas, self._deltas = self._deltas, {}
        return deltas

    def step(self) -> list[SampleResult]:
        """Prefill within the budget, grow every running sample by one token; returns what finished."""
        running = list(self._samples)
        self._start_samples()
        self._admit()
        self._prefill()
        self._start_samples()
        self._grow([sample for sample in running if sample in self._samples])
        for sample in self._samples:
            if sample.parent.stream and sample.sent.tokens < len(sample.tokens):
                self._report(sample, None)
        return self._collect()

    def _admit(self) -> None:
        """First come, first served: a request that does not fit holds up those behind it.

        Nothing joins while a request under way lacks room for its next sample, or it might never get it.
        """
        if any(r.first_logits_V is not None and not r.all_started for r in self._active):
            return
        for request in list(self._waiting):
            if len(self._active) == self._max_batch:
                return
            asks = request.needs_whole_prompt or not self._model.contracts.prefixes
            found, states = Found([], None) if asks else self._prefixes.match(request.adapter, request.keys)
            if not asks and self._follows(request, len(found)):
                self._pool.release(found)
                continue
            # Active requests that have no sample yet must still find room for their first.
            owed = sum(r.sample_pages for r in self._active if r.num_started == 0)
            if request.prompt_pages - len(found) + request.sample_pages + owed > self._pool.num_available:
                self._pool.release(found)
                return
            self._waiting.remove(request)
            request.slot.pages = found + self._pool.allocate(request.prompt_pages - len(found))
            if states is not None:
                self._cache.fork(states, request.slot)
            request.num_prefilled = request.num_found = len(found) * PAGE_TOKENS
            self._active.append(request)

    def _follows(self, request: ActiveRequest, num_found: int) -> bool:
        """Whether a prompt under way will leave more than ``num_found`` pages that this one begins with."""
        return any(
            not r.is_prefilled and r.adapter is request.adapter and self._begins_as(request, r, num_found)
            for r in self._active
        )

    def _begins_as(self, request: ActiveRequest, other: ActiveRequest, num_found: int) -> bool:
        num = (num_found + 1) * PAGE_TOKENS
        if self._state_tokens is not None:
            # Only there are its states kept, and only if it has yet to come by.
            num = self._keeps_states_at(other)
            if num <= num_found * PAGE_TOKENS or other.num_prefilled >= num:
                return False
        return num < request.prompt_length and other.keys[:num] == request.keys[:num]

    def _keeps_states_at(self, request: ActiveRequest) -> int:
        """Tokens of a prompt behind which its recurrent states are kept; 0 for none."""
        if self._state_tokens is None or request.needs_whole_prompt:
            return 0
        return (request.prompt_length - 1) // self._state_tokens * self._state_tokens

    def _prefill(self) -> None:
        budget = self._prefill_budget
        if self._samples and not self._is_burst():
            # Running samples wait for a short part of a long prompt only.
            budget = max(1, budget // _PARTS)
        batch: list[tuple[ActiveRequest, PromptChunk]] = []
        for request in self._active:
            if budget > 0 and not request.is_prefilled:
                stop = min(request.prompt_length, request.num_prefilled + budget)
                if request.num_prefilled < self._keeps_states_at(request):
                    stop = min(stop, self._keeps_states_at(request))
                stop = request.chunk_stop(stop)
                chunk = PromptChunk(request.slot, request.num_prefilled, stop, request.routes, request.images)
                batch.append((request, chunk))
                budget -= stop - request.num_prefilled
        if not batch:
            return
        batch = _by_adapter(batch, lambda item: item[0].adapter)
        h_TD = self._prefill_forward(batch)
        for (request, chunk), h_ND in zip(batch, h_TD.split([c.stop - c.start for _, c in batch]), strict=True):
            self._prefilled(request, chunk, h_ND)

    def _is_burst(self) -> bool:
        """Whether prompts outnumber the running samples and all fit one pass: to take turns would cost both more."""
        left = [r.prompt_length - r.num_prefilled for r in self._active if not r.is_prefilled]
        return len(left) > len(self._samples) and sum(left) <= self._prefill_budget

    def _prefill_forward(self, batch: list[tuple[ActiveRequest, PromptChunk]]) -> Tensor:
        tokens = [t for request, c in batch for t in request.request.prompt[c.start : c.stop]]
        adapters = AdapterBatch.of([(c.stop - c.start, request.adapter) for request, c in batch])
        return self._runner.prefill(tokens, [c for _, c in batch], adapters)

    def _prefilled(self, request: ActiveRequest, chunk: PromptChunk, h_ND: Tensor) -> None:
        request.num_prefilled = chunk.stop
        if chunk.stop == self._keeps_states_at(request) > 0 and bool(h_ND[-1].isfinite().all()):
            states = CacheSlot([])
            self._cache.fork(request.slot, states)
            self._prefixes.insert(request.adapter, request.keys[: chunk.stop], request.slot.pages, states)
        if request.prompt_scores is not None:
            request.prompt_scores.add(self._model, chunk.start, h_ND, request.adapter)
        if request.is_prefilled:
            logits_V = self._model.logits(h_ND[-1:], AdapterBatch.of([(1, request.adapter)]))[0]
            request.first_logits_V = logits_V
            if logits_V.isfinite().all():
                self._share(request.adapter, request.keys, request.slot)

    def _start_samples(self) -> None:
        """Start samples of prefilled requests while there is room, and draw their first tokens."""
        started: list[Sample] = []
        logits: list[Tensor] = []
        for request in self._active:
            if request.first_logits_V is None:
                continue
            while not request.all_started and self._has_room(request, len(started)):
                started.append(self._start(request))
                logits.append(request.first_logits_V)
            if request.all_started and request.slot.pages:
                self._release(request.slot)
        if started:
            self._samples += started
            self._draw(started, torch.stack(logits))

    def _has_room(self, request: ActiveRequest, num_starting: int) -> bool:
        owed = sum(r.sample_pages for r in self._active if r.num_started == 0 and r is not request)
        room = request.sample_pages + (owed if request.num_started > 0 else 0)
        return room <= self._pool.num_available and len(self._samples) + num_starting < self._max_batch

    def _start(self, request: ActiveRequest) -> Sample:
        shared = request.slot.pages[: request.shared_pages]
        own = self._pool.allocate(request.sample_pages)
        self._pool.share(shared)
        if own and request.prompt_pages > request.shared_pages:
            self._pool.copy_page(request.slot.pages[-1], own[0])
        slot = CacheSlot([*shared, *own], grows=True, num_in_pages=request.prompt_length)
        self._cache.fork(request.slot, slot)
        index = request.num_started
        request.num_started += 1
        generator = sample_generator(request.request.params.seed, index)
        text = SampleText(self._vocabulary, request.stops)
        sample = Sample(request, index, slot, generator, text)
        if request.grammar is not None:
            sample.constraint = self._constraint(request.request, request.grammar)
        asked = request.request
        sample.penalties = Penalties.of(asked.params, asked.prompt, self._num_tokens, self._model.device)
        if request.request.top_logprobs > 0:
            sample.top_logprobs = []
        if request.request.token_bytes:
            sample.token_bytes = []
        return sample

    def _grow(self, samples: list[Sample]) -> None:
        if not samples:
            return
        samples = _by_adapter(samples, lambda s: s.parent.adapter)
        self._draw(samples, self._runner.decode(samples))

    def _draw(self, samples: list[Sample], logits_BV: Tensor) -> None:
        finite: list[bool] = logits_BV.sum(-1).isfinite().tolist()
        if not all(finite):
            for sample, ok in zip(samples, finite, strict=True):
                if not ok:
                    self._fail(sample, OperationFailed("the model's logits are not finite", "NonFiniteLogits"))
            kept = [row for row, s in enumerate(samples) if s in self._samples]
            samples, logits_BV = [samples[row] for row in kept], logits_BV[kept]
            if not samples:
                return
        drawn = self._model.draw(logits_BV, [_row(sample) for sample in samples], self._num_tokens)
        for sample, token, logprob, top in zip(samples, *drawn, strict=True):
            self._append(sample, token, logprob, top)
        for sample in samples:
            # Looked at when all have grown: a failure takes its siblings along.
            if sample in self._samples:
                self._look_for_the_end(sample)

    def _append(self, sample: Sample, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        request = sample.parent
        sample.tokens.append(token)
        if sample.penalties is not None:
            sample.penalties.add(token)
        sample.logprobs.append(logprob)
        if sample.top_logprobs is not None:
            sample.top_logprobs.append(
                [TokenLogprob(t, value, rank, self._raw(request, t)) for rank, (t, value) in enumerate(top, start=1)]
            )
        if sample.token_bytes is not None:
            assert self._vocabulary is not None
            sample.token_bytes.append(self._vocabulary.token_bytes(token))

    def _raw(self, request: ActiveRequest, token: int) -> bytes | None:
        if not request.request.token_bytes or self._vocabulary is None:
            return None
        return self._vocabulary.token_bytes(token)

    def _look_for_the_end(self, sample: Sample) -> None:
        token, params = sample.tokens[-1], sample.parent.request.params
        if token in self._ends(params) or token in params.stop_token_ids or sample.text.add(token):
            self._finish(sample, "stop")
            return
        if sample.constraint is not None:
            try:
                sample.constraint.accept(token)
            except OperationFailed as error:
                self._fail(sample, error)
                return
            if sample.constraint.must_end:
                self._finish(sample, "stop")
                return
        if len(sample.tokens) == params.max_tokens:
            self._finish(sample, "length")

    def _finish(self, sample: Sample, reason: StopReason) -> None:
        self._keep(sample)
        self._forget(sample)
        sample.text.finish()
        if sample.parent.stream:
            self._report(sample, reason)
        sample.parent.finished[sample.index] = sample.finished(reason)

    def _keep(self, sample: Sample) -> None:
        """Leave the sample's full pages to those whose prompt goes on from it."""
        known = [*sample.parent.keys, *sample.tokens[:-1]]
        self._cache.write_back(sample.slot, len(known) // PAGE_TOKENS * PAGE_TOKENS)
        self._share(sample.parent.adapter, known, sample.slot)

    def _share(self, adapter: Adapter | None, tokens: list[int], slot: CacheSlot) -> None:
        """Leave the pages that are full of ``tokens`` to those whose prompt begins like that."""
        if self._model.contracts.prefixes and self._state_tokens is None:
            self._prefixes.insert(adapter, tokens, slot.pages)

    def _release(self, slot: CacheSlot) -> None:
        self._cache.leave(slot)
        self._pool.release(slot.pages)
        slot.pages = []

    def _forget(self, sample: Sample) -> None:
        self._release(sample.slot)
        self._samples.remove(sample)

    def _report(self, sample: Sample, reason: StopReason | None) -> None:
        self._deltas.setdefault(sample.parent.request.request_id, []).append(sample.delta(reason))

    def _fail(self, sample: Sample, error: OperationFailed) -> None:
        if sample in self._samples:
            self._failures.append((sample.parent.request.request_id, error))
            self._drop(sample.parent)

    def _drop(self, request: ActiveRequest) -> None:
        for sample in [s for s in self._samples if s.parent is request]:
            self._forget(sample)
        self._release(request.slot)
        self._active.remove(request)
        self._deltas.pop(request.request.request_id, None)

    def _collect(self) -> list[SampleResult]:
        done = [r for r in self._active if r.is_finished]
        self._active = [r for r in self._active if not r.is_finished]
        return [_result(r) for r in done]


def _result(request: ActiveRequest) -> SampleResult:
    sequences = [request.finished[index] for index in range(request.request.num_samples)]
    scores = request.prompt_scores
    return SampleResult(
        request.request.request_id,
        sequences,
        None if scores is None else scores.positions,
        target_logprobs=None if scores is None else scores.target_logprobs,
        prompt_draws=None if scores is None else scores.draws,
        num_cached=request.num_found,
        routes=None if request.routes is None else request.routes.result(),
    )


def _row(sample: Sample) -> Row:
    mask_V = None if sample.constraint is None else sample.constraint.mask_V
    request = sample.parent.request
    return Row(request.params, sample.uniform(), mask_V, request.top_logprobs, sample.penalties)


def _by_adapter(items: list[_Item], adapter_of: Callable[[_Item], Adapter | None]) -> list[_Item]:
    """Rows of one adapter together, adapters in the order they appear, so that a batch is reproducible."""
    places: dict[int, int] = {}
    return sorted(items, key=lambda item: places.setdefault(id(adapter_of(item)), len(places)))
