"""After each publish: does the sampler give a short text the logprobs that the trainer gave it?"""

import asyncio
import logging
import math
import uuid
from collections.abc import Callable

import msgspec

from selfloop.control.data_dir.transient_errors import tried
from selfloop.control.observe import instruments
from selfloop.control.observe.meter import Meter
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.types.logline import Scope, bind_only
from selfloop.types.result import Probe, SaveResult
from selfloop.types.sampling import AdapterRef, SampleRequest, SampleResult, SamplingParams
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import CancelSample, Sample

log = logging.getLogger(__name__)

_decoder: "msgspec.msgpack.Decoder[SampleResult]" = msgspec.msgpack.Decoder(SampleResult)


class PublishChecks:
    """One comparison a run at a time, the newest; nobody waits for it, nothing is woken or charged for it.

    Args:
        worker_of: the loaded worker of a base model, None where there is none.
    """

    def __init__(self, store: CheckpointStore, meter: Meter, worker_of: Callable[[str], WorkerClient | None]) -> None:
        self._store = store
        self._meter = meter
        self._worker_of = worker_of
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, run: RunRow, result: SaveResult) -> None:
        """Compare what was published just now, if the worker computed something to compare with."""
        worker = self._worker_of(run.model_name)
        if result.probe is None or worker is None:
            return
        if (earlier := self._tasks.pop(run.id, None)) is not None:
            earlier.cancel()
        scope = Scope(team_id=run.team_id, deployment_id=run.deployment_id, run_id=run.id)
        task = asyncio.create_task(self._check(scope, worker, result, result.probe), name=f"check-publish-{run.id}")
        self._tasks[run.id] = task
        task.add_done_callback(lambda done: self._forget(run.id, done))

    async def stop(self) -> None:
        """Give up what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, run_id: str, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]

    async def _check(self, scope: Scope, worker: WorkerClient, saved: SaveResult, probe: Probe) -> None:
        bind_only(scope)
        what = f"checkpoint {saved.name!r} of step {saved.step}"
        if probe.equals_base:
            log.warning("the published weights equal the base model: %s has an adapter that changes nothing", what)
        with tried(f"comparing {what} with its sampler"):
            try:
                gap = await self._gap(worker, saved.checkpoint_id, probe)
            except (WorkerLost, FileNotFoundError):
                return  # The worker ended, or the checkpoint was replaced: there is nothing to compare.
            except OperationFailed as error:
                if error.error_class != "NonFiniteLogits":
                    log.warning("the published weights could not be compared with the sampler's: %s: %s", what, error)
                    return
                gap = math.nan
            self._record(scope, what, gap, probe.bound)

    async def _gap(self, worker: WorkerClient, checkpoint_id: str, probe: Probe) -> float:
        """Mean absolute difference in nats."""
        if not all(map(math.isfinite, probe.logprobs)):
            return math.nan
        adapter = AdapterRef(checkpoint_id, self._store.ref(await self._store.folder(checkpoint_id)))
        request = SampleRequest(
            uuid.uuid4().hex, probe.tokens, 1, SamplingParams(1, temperature=0.0), adapter, prompt_logprobs=0
        )
        try:
            answer = await worker.call(Sample(request))
        except asyncio.CancelledError:
            worker.call(CancelSample(request.request_id)).add_done_callback(_seen)
            raise
        scored = _decoder.decode(answer).prompt_logprobs
        assert scored is not None
        sampled = [position[0].logprob for position in scored if position is not None]
        return math.fsum(abs(a - b) for a, b in zip(sampled, probe.logprobs, strict=True)) / len(sampled)

    def _record(self, scope: Scope, what: str, gap: float, bound: float) -> None:
        if math.isfinite(gap):
            instruments.PUBLISH_GAP.observe(gap)
            self._meter.note_gap(scope.deployment_id, gap)
        if not gap <= bound:
            instruments.PUBLISHES_OUT_OF_BOUNDS.inc()
            log.warning(
                "sampler and trainer differ after the publish of %s: by %.3g nats a token in the mean, at most %g "
                "is rounding",
                what,
                gap,
                bound,
            )


def _seen(future: "asyncio.Future[bytes]") -> None:
    if not future.cancelled():
        future.exception()
