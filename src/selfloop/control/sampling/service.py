"""Samples: pick the weights, bring the sampler up, and hold the caller until the tokens are there."""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import msgspec

from selfloop.control.context import Context
from selfloop.control.resources.checkpoints.pinned import pinned_key
from selfloop.control.sampling.chats import Chat, ChatFacts, Prompt, placed
from selfloop.control.sampling.recorded import RecordedSequences
from selfloop.control.sampling.stream_resume import Continuation
from selfloop.storage.db import queries_checkpoints, queries_models_deployed, queries_resources
from selfloop.types.errors import BadRequest, Conflict, NotFound, NotReady, OperationFailed, SelfloopError, WorkerLost
from selfloop.types.images import Image
from selfloop.types.model_folder import read_chat_template
from selfloop.types.resources import Checkpoint, PinnedCheckpoint, Sampler
from selfloop.types.sampling import (
    AdapterRef,
    PromptTargets,
    SampleDelta,
    SampleRequest,
    SampleResult,
    SamplingParams,
    room_after,
)
from selfloop.types.status import SamplerStatus
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import CancelSample, Command, Detokenize, RenderChat, RenderedChat, Sample, Tokenize

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
# A list is a part of a stream, a map the answer itself.
_sample_decoder: "msgspec.msgpack.Decoder[list[SampleDelta] | SampleResult]" = msgspec.msgpack.Decoder(
    list[SampleDelta] | SampleResult
)
_chat_decoder: "msgspec.msgpack.Decoder[RenderedChat]" = msgspec.msgpack.Decoder(RenderedChat)
_prompts_decoder: "msgspec.msgpack.Decoder[list[list[int]]]" = msgspec.msgpack.Decoder(list[list[int]])
_bytes_decoder: "msgspec.msgpack.Decoder[list[bytes]]" = msgspec.msgpack.Decoder(list[bytes])


@dataclass(frozen=True, slots=True)
class Weights:
    """What a request is served from: ``adapter`` None is the base model, at policy version 0.

    ``run_id`` is the run of the sampler's team that trained it, None if there is none.
    """

    adapter: AdapterRef | None
    policy_version: int
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What to sample, as a dialect asks for it: a :class:`SampleRequest` whose weights are not chosen yet.

    ``record_as`` names it among its sampler's, when what is sampled is to be recorded for training; with ``routes``
    also which experts each token went to.
    """

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    prompt_logprobs: int | None = None
    top_logprobs: int = 0
    token_bytes: bool = False
    prompt_logprobs_last_n: int | None = None
    prompt_targets: PromptTargets | None = None
    prompt_draws: int = 0
    record_as: str | None = None
    routes: bool = False
    images: list[Image] = field(default_factory=list[Image])

    @property
    def asks_about_prompt(self) -> bool:
        return self.prompt_logprobs is not None or self.prompt_targets is not None or self.prompt_draws > 0


class Sampling:
    def __init__(self, context: Context) -> None:
        self._c = context
        self.recorded = RecordedSequences(context.db, context.blobs)

    async def weights(
        self,
        sampler: Sampler,
        checkpoint: Checkpoint | PinnedCheckpoint | None,
        min_version: int | None,
        timeout_s: float,
    ) -> Weights:
        """Choose the weights: the live adapter, unless a checkpoint is pinned and the live one is behind.

        Args:
            checkpoint: pinned by the request; with ``min_version`` only until the live adapter reaches it.
            min_version: lowest policy version the caller accepts of the live adapter.

        Raises:
            NotReady: the live adapter stays behind the floor for ``timeout_s``.
        """
        live = await self._row(sampler.id)
        if min_version is not None and live.live_version >= min_version:
            checkpoint = None
        elif checkpoint is None and min_version is not None:
            live = await self._await_version(live, min_version, timeout_s)
        return await self._weights_of(live, checkpoint)

    async def _weights_of(self, live: Sampler, checkpoint: Checkpoint | PinnedCheckpoint | None) -> Weights:
        """Those of ``checkpoint``, or what the sampler serves by its row."""
        if checkpoint is None:
            live_id = live.checkpoint_id or live.live_checkpoint_id
            if live_id is None:
                return Weights(None, 0)
            async with self._c.db.look_up() as session:
                checkpoint = await queries_models_deployed.pinned_one(session, live.id, live_id)
                checkpoint = checkpoint or await queries_checkpoints.stored(session, live_id)
            if checkpoint is None:
                raise NotFound("checkpoint", live_id, "it was deleted, and this sampler served it")
        if isinstance(checkpoint, PinnedCheckpoint):
            ref = self._c.blobs.ref(pinned_key(checkpoint.sampler_id, checkpoint.checkpoint_id))
            return Weights(AdapterRef(checkpoint.checkpoint_id, ref), checkpoint.step, checkpoint.run_id)
        try:
            ref = self._c.store.ref(await self._c.store.folder(checkpoint.id))
        except FileNotFoundError:
            raise NotFound("checkpoint", checkpoint.id, "its files are gone") from None
        run_id = checkpoint.run_id if checkpoint.team_id == live.team_id else None
        return Weights(AdapterRef(checkpoint.id, ref), checkpoint.step, run_id)

    async def live_version(self, sampler: Sampler) -> int:
        return (await self._row(sampler.id)).live_version

    async def sample(self, sampler: Sampler, weights: Weights, spec: SampleSpec) -> SampleResult:
        """Sample, waiting for the worker where it still loads; a worker that dies is replaced and asked again.

        Raises:
            BadRequest: the prompt leaves no room within the sampler's length, or the worker refused a field.
            Conflict: the sampler was deactivated, or its adapter gives no finite numbers.
            OperationFailed: the base model cannot be loaded, or the engine refused.
        """
        async with contextlib.aclosing(self._sampled_parts(sampler, weights, spec, stream=False)) as parts:
            async for part in parts:
                if isinstance(part, SampleResult):
                    if spec.record_as is not None:
                        version = weights.policy_version
                        await self.recorded.record(sampler, spec.record_as, spec.prompt, part, version)
                    return msgspec.structs.replace(part, routes=None)
        raise AssertionError("a sample ends in its result")

    async def sample_newest(self, sampler: Sampler, spec: SampleSpec) -> SampleResult:
        """Sample from what the sampler has by its row; where that was replaced meanwhile, from what it has then.

        Raises what :meth:`sample` raises.
        """
        # The row was read for this request: a burst of samples must not queue at the database a second time.
        weights = await self._weights_of(sampler, None)
        while True:
            try:
                return await self.sample(sampler, weights, spec)
            except SelfloopError:
                newest = await self.weights(sampler, None, None, 0.0)
                if newest == weights:
                    raise
                weights = newest

    async def check(self, sampler: Sampler, spec: SampleSpec) -> None:
        """Refuse what could never be sampled, before it waits. Raises as :meth:`sample` does."""
        _check_live(sampler)
        await self._check_tokens(sampler, spec)

    async def stream(
        self, sampler: Sampler, weights: Weights, spec: SampleSpec
    ) -> AsyncGenerator[SampleDelta | SampleResult]:
        """What the samples grow by, as they grow, then all of them. Closing the generator ends the sampling.

        A worker that dies is replaced and the request sampled again with the same seed; the stream goes on
        where it was.

        Raises:
            WorkerLost: besides what :meth:`sample` raises: sampling again did not repeat what was given out.
        """
        if spec.params.seed is None:
            params = msgspec.structs.replace(spec.params, seed=secrets.randbits(63))
            spec = replace(spec, params=params)
        async with contextlib.aclosing(self._sampled_parts(sampler, weights, spec, stream=True)) as parts:
            async for part in parts:
                yield part

    async def tokenize(self, sampler: Sampler, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, as the model's own tokenizer makes them.

        Raises:
            BadRequest: a text that must be longer than the sampler takes.
        """
        command = Tokenize(texts, add_special_tokens, sampler.team_id, sampler.max_seq_len)
        return _prompts_decoder.decode(await self._ask(sampler, command))

    async def token_bytes(self, sampler: Sampler, tokens: list[int], field: str = "prompt") -> list[bytes]:
        """What each token stands for; ``field`` gives them."""
        model = await self._c.catalogue.resolve(sampler.base_model)
        _check_vocabulary(field, tokens, model.vocab_size)
        return _bytes_decoder.decode(await self._ask(sampler, Detokenize(tokens)))

    async def render_chat(self, sampler: Sampler, chat: Chat) -> Prompt:
        """A conversation in the model's own chat template.

        Raises:
            BadRequest: the model has no template, its template refuses the conversation, or that must be longer than
                the sampler takes.
        """
        return placed(await self._rendered(sampler, chat, sampler.max_seq_len), chat.images)

    async def count_chat(self, sampler: Sampler, chat: Chat) -> int:
        """How many tokens a conversation is: perhaps more than the sampler takes. Raises as :meth:`render_chat`."""
        rendered = await self._rendered(sampler, chat, None)
        return len(rendered.tokens) + sum(image.num_tokens - 1 for image in chat.images)

    async def _rendered(self, sampler: Sampler, chat: Chat, max_tokens: int | None) -> RenderedChat:
        command = RenderChat(
            chat.messages,
            chat.tools,
            chat.add_generation_prompt,
            chat.continue_final_message,
            chat.options,
            sampler.team_id,
            max_tokens,
            len(chat.images),
        )
        return _chat_decoder.decode(await self._ask(sampler, command))

    async def chat_facts(self, sampler: Sampler) -> ChatFacts:
        """What the sampler's model takes in conversations."""
        model = await self._c.catalogue.resolve(sampler.base_model)
        folder = await self._c.catalogue.folder(sampler.model_name)
        template = None if folder is None else await asyncio.to_thread(read_chat_template, folder)
        return ChatFacts(template, model.vision)

    async def _sampled_parts(
        self, sampler: Sampler, weights: Weights, spec: SampleSpec, *, stream: bool
    ) -> AsyncGenerator[SampleDelta | SampleResult]:
        _check_live(sampler)
        await self._check_tokens(sampler, spec)
        request = SampleRequest(
            request_id=uuid.uuid4().hex,
            prompt=spec.prompt,
            num_samples=spec.num_samples,
            params=spec.params,
            adapter=weights.adapter,
            prompt_logprobs=spec.prompt_logprobs,
            top_logprobs=spec.top_logprobs,
            token_bytes=spec.token_bytes,
            prompt_logprobs_last_n=spec.prompt_logprobs_last_n,
            prompt_targets=spec.prompt_targets,
            prompt_draws=spec.prompt_draws,
            routes=spec.routes,
            images=spec.images,
        )
        continuation = Continuation()
        observer = self._c.outcomes.observer
        with self._c.lifecycle.using(sampler.id), observer.sampling(self._c.lifecycle.key_of(sampler.id)) as sampled:
            for attempt in range(1, _MAX_ATTEMPTS + 1):
                worker = await self._c.lifecycle.wake(sampler.id)
                continuation.restart()
                try:
                    async with contextlib.aclosing(_parts(worker, request, stream)) as parts:
                        async for part in parts:
                            if isinstance(part, SampleResult):
                                sampled(sampler, weights.run_id, len(spec.prompt), part)
                                yield part
                                return
                            fresh = continuation.fresh(part)
                            if fresh is not None:
                                yield fresh
                except OperationFailed as error:
                    raise _refusal(error) from None
                except WorkerLost as lost:
                    if not worker.lost.done():
                        raise
                    log.warning("sample %s lost its worker (%d): %s", request.request_id, attempt, lost)
        raise WorkerLost(f"the worker died {_MAX_ATTEMPTS} times while sampling this request")

    async def _ask(self, sampler: Sampler, command: Command) -> bytes:
        """A question about text, which the worker answers beside its work."""
        _check_live(sampler)
        with self._c.lifecycle.using(sampler.id):
            for _attempt in range(_MAX_ATTEMPTS):
                worker = await self._c.lifecycle.wake(sampler.id)
                try:
                    return await worker.call(command)
                except OperationFailed as error:
                    raise _refusal(error) from None
                except WorkerLost as lost:
                    log.warning("%s lost its worker: %s", type(command).__name__, lost)
        raise WorkerLost(f"the worker died {_MAX_ATTEMPTS} times at this request")

    async def _check_tokens(self, sampler: Sampler, spec: SampleSpec) -> None:
        model = await self._c.catalogue.resolve(sampler.base_model)
        limit = sampler.max_seq_len
        if spec.params.max_tokens > room_after(len(spec.prompt), limit, scored=spec.asks_about_prompt):
            raise BadRequest(
                "max_tokens",
                f"prompt ({len(spec.prompt)} tokens) plus max_tokens ({spec.params.max_tokens}) within the "
                f"sampler's {limit} tokens",
            )
        params = spec.params
        named = ("prompt", spec.prompt), ("stop_token_ids", params.stop_token_ids), ("logit_bias", [*params.logit_bias])
        for name, tokens in named:
            _check_vocabulary(name, tokens, model.vocab_size)

    async def _row(self, sampler_id: str) -> Sampler:
        async with self._c.db.look_up() as session:
            row = await queries_resources.sampler(session, sampler_id)
        assert row is not None
        return row

    async def _await_version(self, live: Sampler, min_version: int, timeout_s: float) -> Sampler:
        published = self._c.outcomes.published
        deadline = time.monotonic() + timeout_s
        while True:
            seen = published.count
            live = await self._row(live.id)
            if live.live_version >= min_version:
                return live
            if (left_s := deadline - time.monotonic()) <= 0:
                raise NotReady(
                    f"the live adapter is at policy version {live.live_version}, behind the asked {min_version}", 1.0
                )
            await published.wait(seen, left_s)


async def _parts(
    worker: WorkerClient, request: SampleRequest, stream: bool
) -> AsyncGenerator[SampleDelta | SampleResult]:
    """The worker's answer to one asking; a caller that goes away before its end frees its place in the batch."""
    ended = False
    try:
        async with contextlib.aclosing(worker.stream(Sample(request, stream))) as answers:
            async for answer in answers:
                part = _sample_decoder.decode(answer)
                if isinstance(part, SampleResult):
                    ended = True
                    yield part
                else:
                    for delta in part:
                        yield delta
    except OperationFailed:
        ended = True
        raise
    finally:
        if not ended and not worker.lost.done():
            worker.call(CancelSample(request.request_id)).add_done_callback(_seen)


def _refusal(error: OperationFailed) -> SelfloopError:
    """What the worker's refusal means to whoever asked."""
    if error.error_class == "BadRequest":
        field, _, expected = str(error).partition(": ")
        return BadRequest(field, expected)
    if error.error_class == "NonFiniteLogits":
        return Conflict(f"{error}: the adapter that was asked for has diverged in training")
    return error


def _check_live(sampler: Sampler) -> None:
    if sampler.status in (SamplerStatus.INACTIVE, SamplerStatus.DEACTIVATING):
        raise Conflict(f"sampler {sampler.id} is {sampler.status}: it was deactivated", reason="SAMPLER_INACTIVE")


def _check_vocabulary(field: str, tokens: list[int], vocab_size: int) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise BadRequest(field, f"token ids from 0 to {vocab_size - 1}")


def _seen(future: "asyncio.Future[bytes]") -> None:
    if not future.cancelled():
        future.exception()
