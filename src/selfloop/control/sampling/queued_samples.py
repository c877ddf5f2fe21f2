"""Samples that are accepted first and sampled later: durable from the 202 on, each with one outcome that stays."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from selfloop.control.context import Context
from selfloop.control.data_dir.transient_errors import Ages, is_passing, tried
from selfloop.control.queue.durable_bytes import BytesLost, DurableBytes, StoredBytes
from selfloop.control.queue.operations import RESULT_KEPT_S, Pending
from selfloop.control.queue.waiters import AwaitedOutcomes, Key
from selfloop.control.sampling.service import SampleSpec, Sampling, Weights
from selfloop.storage.db import queries_resources, queries_samples
from selfloop.storage.db.tables import QueuedSampleRow
from selfloop.types.errors import Conflict, NotFound, OperationFailed, SelfloopError, Unavailable
from selfloop.types.ids import new_id
from selfloop.types.resources import Sampler
from selfloop.types.sampling import AdapterRef, SampleResult
from selfloop.types.status import OperationState, SamplerStatus

log = logging.getLogger(__name__)

# As many as a worker's batch holds, and some that wait there so that it never idles; the rest can be cancelled.
_MAX_IN_WORKER = 256
_PURGE_EVERY_S = 60.0
_RETRY_S = 1.0
_NUM_RECENT = 256
_UNFORESEEN = "internal error; the server's log has the cause"


class AcceptedSample(msgspec.Struct, frozen=True):
    """What is sampled, fixed when the request is accepted, so that sampling it once more gives the same.

    Args:
        spec: its ``params.seed`` is never None. Stored under the name that it had in older versions.
        checkpoint_id: the weights; None is the base model.
        with_logprobs: whether the caller asked for the sampled tokens' logprobs.
    """

    spec: SampleSpec = msgspec.field(name="draw")
    checkpoint_id: str | None
    policy_version: int
    with_logprobs: bool


@dataclass(frozen=True, slots=True)
class Sampled:
    """A finished sample."""

    request: AcceptedSample
    result: SampleResult


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample that ended in an error, or was cancelled."""

    error: str
    error_class: str


@dataclass(slots=True)
class _Stored:
    """An outcome as it lies in the database; ``result`` None with an error."""

    payload: bytes = b""
    result: bytes | None = None
    error: str = ""
    error_class: str = ""

    @property
    def num_bytes(self) -> int:
        return len(self.payload) + len(self.result or b"")

    def read(self) -> Sampled | Failed:
        if self.result is None:
            return Failed(self.error, self.error_class)
        return Sampled(_payload_decoder.decode(self.payload), _result_decoder.decode(self.result))


class _Live:
    """A sample without an outcome: who carries it out, and whether it can still be taken back."""

    def __init__(self) -> None:
        self.is_taken = False
        self.task: asyncio.Task[None] | None = None


_payload_decoder: "msgspec.msgpack.Decoder[AcceptedSample]" = msgspec.msgpack.Decoder(AcceptedSample)
_result_decoder: "msgspec.msgpack.Decoder[SampleResult]" = msgspec.msgpack.Decoder(SampleResult)


class QueuedSamples:
    """The queue of every sampler. Samples of one base model start in the order of their acceptance."""

    def __init__(self, context: Context, sampling: Sampling) -> None:
        self._c = context
        self._sampling = sampling
        self._bytes = DurableBytes(context.db, context.blobs, "samples")
        self._live: dict[Key, _Live] = {}
        self._awaited: AwaitedOutcomes[_Stored] = AwaitedOutcomes(lambda stored: stored.num_bytes, _NUM_RECENT)
        self._room: dict[str, asyncio.Semaphore] = {}
        self._purger: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up every sample that was accepted before a restart, and clear away what it left half-done."""
        async with self._c.db.read() as session:
            queued = await queries_samples.queued(session)
            samplers = await queries_resources.samplers_named(session, {sampler_id for sampler_id, _id in queued})
        await self._bytes.clear_leftovers(queries_samples.blob_keys)
        for sampler_id, id in queued:
            self._begin(samplers[sampler_id], id)
        if queued:
            log.info("resuming %d queued samples", len(queued))
        self._purger = asyncio.create_task(self._keep_purging(), name="purge-samples")

    def send_home(self) -> None:
        """End the long polls; their clients ask again."""
        self._awaited.send_home()

    async def stop(self) -> None:
        """Stop sampling; what has no outcome is taken up at the next start."""
        self.send_home()
        tasks = [live.task for live in self._live.values() if live.task is not None]
        if self._purger is not None:
            tasks.append(self._purger)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def accept(
        self, sampler: Sampler, id: str, fingerprint: str, weights: Weights, spec: SampleSpec, *, with_logprobs: bool
    ) -> str:
        """Make a sample durable and queue it; a repeated request finds the one it made. Returns its id.

        Raises:
            BadRequest: it could never be sampled on this sampler.
            Conflict: the sampler was deactivated, or the id was used for a different request.
            NotReady: the disk is full.
        """
        await self._sampling.check(sampler, spec)
        is_known = (sampler.id, id) in self._awaited or self._awaited.recent((sampler.id, id)) is not None
        if not is_known:
            payload = msgspec.msgpack.encode(_completed_request(weights, spec, with_logprobs))
            self._c.disk_room.check_accept(len(payload))
            # A name of its own: a repeated request, whose seed is another, must not touch the payload that is there.
            name = f"{id}-{new_id()}.sample"
            stored = await self._bytes.put(sampler.id, name, sample_place(sampler.id, id), payload)
            row = QueuedSampleRow(
                sampler_id=sampler.id,
                id=id,
                fingerprint=fingerprint,
                state=OperationState.QUEUED,
                created_at=time.time(),
                payload=stored.inline,
                payload_key=stored.key,
                payload_digest=stored.digest,
            )
            try:
                await self._c.db.write_grouped(lambda connection: queries_samples.add(connection, row))
            except IntegrityError:
                is_known = True
                await self._bytes.delete([stored.key])
            else:
                self._begin(sampler, id)
        if is_known:
            row = await self._row(sampler.id, id)
            if row.fingerprint != fingerprint:
                raise Conflict(f"Idempotency-Key {id} was already used for a different request")
        return id

    async def wait(self, sampler_id: str, id: str, timeout_s: float) -> Sampled | Failed | Pending:
        """The sample's outcome, as soon as there is one within ``timeout_s``.

        Raises:
            NotFound: no such sample, or its result has expired.
        """
        key = (sampler_id, id)
        if key not in self._awaited:
            stored = self._awaited.recent(key)
            if stored is None:
                row = await self._row(sampler_id, id)
                if row.state == OperationState.QUEUED:
                    return Pending("queued")
                stored = await self._load(row)
            return stored.read()
        stored = await self._awaited.wait(key, timeout_s)
        return Pending(self._reason(*key)) if stored is None else stored.read()

    async def cancel(self, sampler_id: str, id: str) -> None:
        """Take back a sample that is not being sampled yet. Raises :class:`Conflict` once it is, or has ended."""
        live = self._live.get((sampler_id, id))
        if live is None or live.is_taken or live.task is None:
            if (await self._row(sampler_id, id)).state == OperationState.CANCELLED:
                return
            raise Conflict(f"sample {id} is already being sampled or has ended")
        live.is_taken = True
        live.task.cancel()
        await self._complete(
            (sampler_id, id), OperationState.CANCELLED, _Stored(error="cancelled by request", error_class="Cancelled")
        )

    # -- sampling -------------------------------------------------------------------------------------

    def _begin(self, sampler: Sampler, id: str) -> None:
        live = self._live[sampler.id, id] = _Live()
        self._awaited.expect((sampler.id, id))
        live.task = asyncio.create_task(self._carry_out(sampler, id, live), name=f"sample-{id}")
        live.task.add_done_callback(lambda task: self._ended((sampler.id, id), live, task))

    async def _carry_out(self, sampler: Sampler, id: str, live: _Live) -> None:
        """From the queue to the outcome."""

        async def attempt() -> None:
            state, stored = await self._sample(sampler, id, live)
            await self._complete((sampler.id, id), state, stored)

        room = self._room.setdefault(sampler.model_name, asyncio.Semaphore(_MAX_IN_WORKER))
        with self._c.lifecycle.using(sampler.id):
            async with room:
                await self._keep_trying((sampler.id, id), attempt)

    def _ended(self, key: Key, live: _Live, task: "asyncio.Task[None]") -> None:
        """Make an error that nobody foresaw the sample's outcome: sampled again, it would meet it again."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error("sampler %s: sample %s failed unexpectedly", *key, exc_info=error)
        if self._live.get(key) is live:
            live.is_taken = True
            failed = _Stored(error=_UNFORESEEN, error_class="InternalError")
            completing = self._keep_trying(key, lambda: self._complete(key, OperationState.ERROR, failed))
            live.task = asyncio.create_task(completing, name=f"sample-{key[1]}")

    async def _keep_trying(self, key: Key, attempt: Callable[[], Awaitable[None]]) -> None:
        """Do ``attempt``, again after errors of our own (disk, database)."""
        while True:
            try:
                await attempt()
            except (OSError, SQLAlchemyError, Unavailable):
                log.exception("sampler %s: sample %s: trying again in %g s", *key, _RETRY_S)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _sample(self, sampler: Sampler, id: str, live: _Live) -> tuple[OperationState, _Stored]:
        try:
            payload = await self._payload(await self._row(sampler.id, id))
            request = _payload_decoder.decode(payload)
            await self._c.lifecycle.wake(sampler.id)
            live.is_taken = True
            weights = Weights(await self._adapter(request), request.policy_version)
            result = await self._sampling.sample(sampler, weights, request.spec)
        except Unavailable:
            raise
        except OSError as error:
            if is_passing(error):
                raise
            live.is_taken = True
            log.exception("sampler %s: sample %s cannot be sampled", sampler.id, id)
            return OperationState.ERROR, _Stored(error=f"it cannot be read: {error}", error_class="RecoveryFailed")
        except SelfloopError as error:
            live.is_taken = True
            log.info("sampler %s: sample %s failed: %s", sampler.id, id, error)
            error_class = error.error_class if isinstance(error, OperationFailed) else type(error).__name__
            return OperationState.ERROR, _Stored(error=str(error), error_class=error_class)
        return OperationState.DONE, _Stored(payload, msgspec.msgpack.encode(result))

    async def _adapter(self, request: AcceptedSample) -> AdapterRef | None:
        if request.checkpoint_id is None:
            return None
        try:
            folder = await self._c.store.folder(request.checkpoint_id)
        except FileNotFoundError:
            hint = "it expired, was deleted or replaced before its turn"
            raise NotFound("checkpoint", request.checkpoint_id, hint) from None
        return AdapterRef(request.checkpoint_id, self._c.store.ref(folder))

    async def _complete(self, key: Key, state: OperationState, stored: _Stored) -> None:
        """Make an outcome durable, then wake who waits for it."""
        sampler_id, id = key
        result = StoredBytes(None, None, None)
        if stored.result is not None:
            place = sample_place(sampler_id, id)
            result = await self._bytes.put_anyhow(sampler_id, f"{id}.result", place, stored.result)
        await self._c.db.write_grouped(
            lambda connection: queries_samples.finish(
                connection,
                sampler_id,
                id,
                state=state,
                at=time.time(),
                result=result.inline,
                result_key=result.key,
                result_digest=result.digest,
                error=stored.error or None,
                error_class=stored.error_class or None,
            )
        )
        del self._live[key]
        self._awaited.complete(key, stored)

    def _reason(self, sampler_id: str, id: str) -> str:
        if self._live[sampler_id, id].is_taken:
            return "running"
        if self._c.lifecycle.status(sampler_id) == SamplerStatus.ACTIVE:
            return "queued behind earlier samples of this base model"
        return f"queued until the sampler is up: {self._c.lifecycle.describe(sampler_id)}"

    # -- rows -----------------------------------------------------------------------------------------

    async def _row(self, sampler_id: str, id: str) -> QueuedSampleRow:
        async with self._c.db.read() as session:
            row = await queries_samples.get(session, sampler_id, id)
        if row is None:
            raise NotFound("operation", id, f"results are kept for {RESULT_KEPT_S:.0f} s")
        return row

    async def _load(self, row: QueuedSampleRow) -> _Stored:
        if row.state != OperationState.DONE:
            return _Stored(error=row.error or "", error_class=row.error_class or "")
        try:
            result = await self._read(row, StoredBytes(row.result, row.result_key, row.result_digest))
            return _Stored(await self._payload(row), result)
        except OperationFailed as error:
            return _Stored(error=f"it was sampled, and its result cannot be read: {error}", error_class="ResultLost")

    async def _payload(self, row: QueuedSampleRow) -> bytes:
        return await self._read(row, StoredBytes(row.payload, row.payload_key, row.payload_digest))

    async def _read(self, row: QueuedSampleRow, stored: StoredBytes) -> bytes:
        """What was stored, bit for bit. Raises :class:`OperationFailed` (``RecoveryFailed``)."""
        try:
            return await self._bytes.get(stored, sample_place(row.sampler_id, row.id))
        except BytesLost as error:
            raise OperationFailed(f"sample {row.id} cannot be read: {error}", "RecoveryFailed") from error

    async def _keep_purging(self) -> None:
        ages = Ages(RESULT_KEPT_S)
        while True:
            await asyncio.sleep(_PURGE_EVERY_S)
            with tried("purge of samples"):
                await self.purge(ages.old())
                await self._sampling.recorded.purge()

    async def purge(self, before: float) -> None:
        """Delete everything finished ``before``."""
        await self._bytes.purge(queries_samples.remove_finished, before)


def sample_place(sampler_id: str, id: str) -> str:
    """What a payload or result belongs to: this sample."""
    return f"{sampler_id}\0{id}\0"


def _completed_request(weights: Weights, spec: SampleSpec, with_logprobs: bool) -> AcceptedSample:
    params = spec.params
    if params.seed is None:
        params = msgspec.structs.replace(params, seed=secrets.randbits(63))
    checkpoint_id = None if weights.adapter is None else weights.adapter.checkpoint_id
    return AcceptedSample(replace(spec, params=params), checkpoint_id, weights.policy_version, with_logprobs)
