"""Draw samples: pick the weights, bring the sampler up, and hold the caller until the tokens are there."""

import asyncio
import logging
import uuid
from dataclasses import dataclass

import msgspec

from selfloop.control.context import Context
from selfloop.control.settle import checkpoint_key
from selfloop.storage.db import queries_checkpoints, queries_resources
from selfloop.storage.db.tables import CheckpointRow, SamplerRow
from selfloop.types.errors import BadRequest, Conflict, NotFound, NotReady, OperationFailed, WorkerLost
from selfloop.types.sampling import AdapterRef, SampleRequest, SampleResult, SamplingParams
from selfloop.types.status import SamplerStatus
from selfloop.worker.protocol import CancelSample, Sample

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_result_decoder: "msgspec.msgpack.Decoder[SampleResult]" = msgspec.msgpack.Decoder(SampleResult)


@dataclass(frozen=True, slots=True)
class Weights:
    """What a request is served from: ``adapter`` None is the base model, at policy version 0."""

    adapter: AdapterRef | None
    policy_version: int


@dataclass(frozen=True, slots=True)
class Draw:
    """A sampling request as a dialect hands it over."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    prompt_logprobs: int | None


class Sampling:
    def __init__(self, context: Context) -> None:
        self._c = context
        self._published = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        context.settlement.on_published = self._announce

    async def weights(
        self, sampler: SamplerRow, checkpoint: CheckpointRow | None, min_version: int | None, timeout_s: float
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
        if checkpoint is None:
            live_id = live.checkpoint_id or live.live_checkpoint_id
            if live_id is None:
                return Weights(None, 0)
            async with self._c.db.read() as session:
                checkpoint = await queries_checkpoints.get(session, live_id)
            if checkpoint is None:
                raise NotFound("checkpoint", live_id, "it expired or was deleted, and this sampler served it")
        path = self._c.blobs.path(checkpoint_key(checkpoint.id))
        return Weights(AdapterRef(checkpoint.id, str(path)), checkpoint.step)

    async def live_version(self, sampler: SamplerRow) -> int:
        return (await self._row(sampler.id)).live_version

    async def draw(self, sampler: SamplerRow, weights: Weights, draw: Draw) -> SampleResult:
        """Sample, waiting for the worker where it still loads; a worker that dies is replaced and asked again.

        Raises:
            BadRequest: the prompt leaves no room within the sampler's length.
            Conflict: the sampler was deactivated, or its adapter gives no finite numbers.
            OperationFailed: the base model cannot be loaded, or the engine refused.
        """
        if sampler.status == SamplerStatus.INACTIVE:
            raise Conflict(f"sampler {sampler.id} is INACTIVE: it was deactivated")
        await self._check_tokens(sampler, draw)
        request = SampleRequest(
            request_id=uuid.uuid4().hex,
            prompt=draw.prompt,
            num_samples=draw.num_samples,
            params=draw.params,
            adapter=weights.adapter,
            prompt_logprobs=draw.prompt_logprobs,
        )
        with self._c.lifecycle.using(sampler.id):
            for attempt in range(1, _MAX_ATTEMPTS + 1):
                worker = await self._c.lifecycle.wake(sampler.id)
                reply = worker.call(Sample(request))
                try:
                    return _result_decoder.decode(await reply)
                except OperationFailed as error:
                    if error.error_class == "BadRequest":
                        raise BadRequest("prompt", str(error)) from None
                    if error.error_class == "NonFiniteLogits":
                        raise Conflict(f"{error}: the adapter that was asked for has diverged in training") from None
                    raise
                except WorkerLost as lost:
                    log.warning("sample %s lost its worker (%d): %s", request.request_id, attempt, lost)
                except asyncio.CancelledError:
                    # The caller went away: free its place in the batch.
                    if not worker.lost.done():
                        worker.call(CancelSample(request.request_id)).add_done_callback(_seen)
                    raise
        raise WorkerLost(f"the worker died {_MAX_ATTEMPTS} times while sampling this request")

    async def _check_tokens(self, sampler: SamplerRow, draw: Draw) -> None:
        model = await self._c.catalogue.resolve(sampler.base_model)
        limit = sampler.max_seq_len
        if len(draw.prompt) + draw.params.max_tokens > limit:
            raise BadRequest(
                "max_tokens",
                f"prompt ({len(draw.prompt)} tokens) plus max_tokens ({draw.params.max_tokens}) within the "
                f"sampler's {limit} tokens",
            )
        for name, tokens in (("prompt", draw.prompt), ("stop_token_ids", draw.params.stop_token_ids)):
            if tokens and not (min(tokens) >= 0 and max(tokens) < model.vocab_size):
                raise BadRequest(name, f"token ids from 0 to {model.vocab_size - 1}")

    async def _row(self, sampler_id: str) -> SamplerRow:
        async with self._c.db.read() as session:
            row = await queries_resources.sampler(session, sampler_id)
        assert row is not None
        return row

    async def _await_version(self, live: SamplerRow, min_version: int, timeout_s: float) -> SamplerRow:
        try:
            async with asyncio.timeout(timeout_s), self._published:
                while live.live_version < min_version:
                    await self._published.wait()
                    live = await self._row(live.id)
        except TimeoutError:
            raise NotReady(
                f"the live adapter is at policy version {live.live_version}, behind the asked {min_version}", 1.0
            ) from None
        return live

    def _announce(self) -> None:
        async def announce() -> None:
            async with self._published:
                self._published.notify_all()

        task = asyncio.create_task(announce())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _seen(future: "asyncio.Future[bytes]") -> None:
    if not future.cancelled():
        future.exception()
