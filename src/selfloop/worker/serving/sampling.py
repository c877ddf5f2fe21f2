"""Sampling calls: from their request to the last of their samples."""

import time

import msgspec

from selfloop.engine.engine import Engine
from selfloop.types.errors import NotFound
from selfloop.types.result import Spent
from selfloop.types.sampling import SampleRequest
from selfloop.worker.protocol import Partial, Reply, ReplyError, Sample, encode
from selfloop.worker.serving.replies import Replies
from selfloop.worker.serving.staging import Staging


class SamplingQueue:
    """Hands requests to the engine's running batch and brings their answers back."""

    def __init__(self, engine: Engine, staging: Staging, replies: Replies) -> None:
        self._engine = engine
        self._staging = staging
        self._replies = replies
        self._tickets: dict[str, int] = {}
        # Seconds that each request has had of the device since the start: a step is shared evenly.
        self._share_s = 0.0
        self._share_at_submit_s: dict[str, float] = {}

    @property
    def has_work(self) -> bool:
        return self._engine.num_sampling > 0

    def take(self, ticket: int, command: Sample) -> None:
        self._replies.guard(ticket, lambda: self._submit(ticket, command.request, stream=command.stream))

    def cancel(self, ticket: int, request_id: str) -> None:
        self._engine.cancel_sample(request_id)
        self._share_at_submit_s.pop(request_id, None)
        cancelled = self._tickets.pop(request_id, None)
        if cancelled is not None:
            self._replies.send(ReplyError(cancelled, "the sample was cancelled", "Cancelled"))
        self._replies.send(Reply(ticket))

    def step(self) -> None:
        """One step of all that is running."""
        num_requests, started = max(len(self._share_at_submit_s), 1), time.monotonic()
        results = self._engine.sample_step()
        self._share_s += (time.monotonic() - started) / num_requests
        for request_id, deltas in self._engine.take_sample_deltas().items():
            self._replies.send(Partial(self._tickets[request_id]), encode(deltas))
        for result in results:
            spent = Spent(self._share_s - self._share_at_submit_s.pop(result.request_id))
            result = msgspec.structs.replace(result, spent=spent)
            self._replies.reply(self._tickets.pop(result.request_id), result)
        for request_id, error in self._engine.take_failed_samples():
            self._share_at_submit_s.pop(request_id, None)
            self._replies.refuse(self._tickets.pop(request_id), error)

    def _submit(self, ticket: int, request: SampleRequest, *, stream: bool) -> None:
        adapter = request.adapter
        if adapter is not None and not self._engine.has_adapter(adapter.checkpoint_id):
            if adapter.folder is None:
                raise NotFound("checkpoint", adapter.checkpoint_id, "its weights are not in memory")
            self._engine.load_adapter(adapter.checkpoint_id, self._staging.to_read(adapter.folder))
        self._engine.submit_sample(request, stream=stream)
        self._share_at_submit_s[request.request_id] = self._share_s
        self._tickets[request.request_id] = ticket
