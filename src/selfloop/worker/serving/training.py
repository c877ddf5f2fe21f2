"""Calls about runs: each run's in the order they were sent, runs in turn by the device time they used, or together.

Losses go through the model a micro-batch at a time, those of several runs in one pass where they fit.
"""

import logging
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from selfloop.engine.engine import Engine
from selfloop.engine.train.request import LossRequest
from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.types.logline import Scope, bind_only
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    Operation,
    OptimStep,
    kind_of,
    operation_decoder,
)
from selfloop.types.result import Result, Spent
from selfloop.worker.protocol import Call, CloseRun, Execute, OpenRun, Reply, Snapshot, Written, encode
from selfloop.worker.serving.background import SnapshotWriter
from selfloop.worker.serving.fair_share import FairShare
from selfloop.worker.serving.operations import carry_out, open_run
from selfloop.worker.serving.replies import Replies, attempt, is_device_lost
from selfloop.worker.serving.staging import Staging

log = logging.getLogger("selfloop.worker")


# A pass with room waits for runs that had a result just now: so large a part of what the last one took, and no longer.
_LINGER_SHARE = 0.15
_MAX_LINGER_S = 0.05

RunCommand = OpenRun | CloseRun | Execute | Snapshot


@dataclass(slots=True, eq=False)
class _Work:
    """A call that waits or is under way.

    Args:
        operation: what an ``Execute`` carries, once it is at the head of its queue.
        request: its passes through the model, once they are laid out.
        has_begun: it had the device.
        alone: nothing of other runs may be computed between its begin and its end.
    """

    ticket: int
    command: RunCommand
    payload: bytes
    alone: bool = False
    operation: Operation | None = None
    request: LossRequest | None = None
    has_begun: bool = False
    spent_s: float = 0.0

    @property
    def run_id(self) -> str:
        return self.command.run_id

    @property
    def num_tokens(self) -> int:
        """Tokens that it sends through the model."""
        if isinstance(self.operation, Forward | ForwardBackward):
            return sum(datum.tokens.num_elements for datum in self.operation.data)
        return 0


class TrainingQueue:
    """The queues of all runs."""

    def __init__(self, engine: Engine, staging: Staging, replies: Replies) -> None:
        self._engine = engine
        self._staging = staging
        self._replies = replies
        self._queues: dict[str, deque[_Work]] = {}
        self._turns: FairShare[str] = FairShare()
        self._last_pass_s = 0.0
        # When runs that have sent nothing since had their last result.
        self._answered_at: dict[str, float] = {}
        self._waiting_since: float | None = None
        self._snapshots = SnapshotWriter()

    @property
    def has_work(self) -> bool:
        return bool(self._queues)

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is being written beside the work."""
        return self._snapshots.is_busy

    def take(self, call: Call, command: RunCommand, payload: bytes) -> None:
        alone = isinstance(command, Execute) and command.alone
        self._queues.setdefault(command.run_id, deque()).append(_Work(call.ticket, command, payload, alone))
        self._turns.join(command.run_id)
        self._answered_at.pop(command.run_id, None)

    def patience_s(self) -> float:
        """How long the next step had better wait for runs that are likely to join it."""
        now, limit = time.monotonic(), min(_MAX_LINGER_S, _LINGER_SHARE * self._last_pass_s)
        self._answered_at = {run_id: at for run_id, at in self._answered_at.items() if now - at < 2 * limit}
        heads = self._heads()
        if not self._answered_at or not all(_waits_for_its_first_pass(work) for work in heads):
            return 0.0
        if sum(work.num_tokens for work in heads) >= self._engine.train_token_budget:
            return 0.0
        if self._waiting_since is None:
            self._waiting_since = now
        return max(0.0, self._waiting_since + limit - now)

    def step(self) -> None:
        """One pass of the model for all runs that fit; or optimizer steps, together; or one call of another kind."""
        self._waiting_since = None
        heads = self._heads()
        if not heads:
            return
        first = next((work for work in heads if work.alone and work.has_begun), heads[0])
        mates = [] if first.alone else [work for work in heads if work is not first and not work.alone]
        with _about(first.run_id):
            match first.operation:
                case Forward() | ForwardBackward():
                    self._pass([first, *(w for w in mates if isinstance(w.operation, Forward | ForwardBackward))])
                case OptimStep():
                    # One after another in one turn: what a step costs is memory traffic of its own run's state.
                    for work in [first, *(w for w in mates if isinstance(w.operation, OptimStep))]:
                        self._carry_out(work)
                case _:
                    self._carry_out(first)

    def _heads(self) -> list[_Work]:
        """The next call of each run, in the order of their turns."""
        heads: list[_Work] = []
        for run_id in self._turns.in_turn():
            work = self._queues[run_id][0]
            if isinstance(work.command, Execute) and work.operation is None:
                try:
                    work.operation = operation_decoder.decode(work.payload)
                except msgspec.DecodeError as error:
                    self._refuse(work, error)
                    continue
                work.payload = b""
            heads.append(work)
        return heads

    def _pass(self, claims: list[_Work]) -> None:
        ready: dict[LossRequest, _Work] = {}
        room = self._engine.train_token_budget
        for work in claims:
            request = self._laid_out(work) if room > 0 else None
            if request is not None:
                ready[request] = work
                room -= request.job.num_next_tokens
        if not ready:
            return
        requests = self._engine.together(list(ready))
        chosen = [ready[request] for request in requests]
        tokens = [request.job.num_next_tokens for request in requests]
        self._begin(chosen)
        started = time.monotonic()
        failure = attempt(lambda: self._engine.advance(requests))
        self._last_pass_s = time.monotonic() - started
        for work, num in zip(chosen, tokens, strict=True):
            self._charge(work, self._last_pass_s * num / sum(tokens))
        if failure is not None:
            self._blame(chosen, failure)
            return
        for work, request in zip(chosen, requests, strict=True):
            if request.job.is_done:
                self._answer(work, request)

    def _laid_out(self, work: _Work) -> LossRequest | None:
        """Its passes, if it has any to make; if not, it is answered."""
        assert isinstance(work.operation, Forward | ForwardBackward)
        if work.request is None:
            run_id, operation = work.run_id, work.operation
            request = attempt(lambda: self._engine.begin(run_id, operation))
            if isinstance(request, Exception):
                self._refuse(work, request)
                return None
            if request.job.is_done:
                self._answer(work, request)
                return None
            work.request = request
        return work.request

    def _blame(self, works: list[_Work], error: Exception) -> None:
        if len(works) == 1 or is_device_lost(error):
            self._refuse(works[0], error)
            return
        log.warning("a pass of %d runs failed, each is tried alone", len(works), exc_info=error)
        for work in works:
            # From its start: a run's state changes only with the result.
            work.request, work.alone, work.has_begun = None, True, False

    def _carry_out(self, work: _Work) -> None:
        self._begin([work])
        started = time.monotonic()
        answer = attempt(lambda: self._perform(work))
        self._charge(work, time.monotonic() - started)
        if isinstance(answer, Exception):
            self._refuse(work, self._consequence(work, answer))
        elif answer is None:
            self._leave(work)
        elif isinstance(answer, bytes):
            self._leave(work)
            self._replies.send(Reply(work.ticket), answer)
        else:
            self._reply(work, answer)

    def _perform(self, work: _Work) -> Result | bytes | None:
        """The result, or the reply's bytes; None when the reply comes later."""
        match work.command:
            case OpenRun() as command:
                open_run(self._engine, self._staging, command)
            case CloseRun(run_id):
                self._engine.remove_run(run_id)
            case Snapshot(background=True) as snapshot:
                self._begin_snapshot(work.ticket, snapshot)
                return None
            case Snapshot(run_id, write_to):
                started, cpu_s = time.monotonic(), time.thread_time()
                self._engine.snapshot(run_id, self._staging.to_write(write_to))
                self._staging.written(write_to)
                return encode(Written(time.monotonic() - started, time.thread_time() - cpu_s))
            case Execute() as execute:
                assert work.operation is not None
                return carry_out(self._engine, self._staging, execute, work.operation)
        return b""

    def _consequence(self, work: _Work, error: Exception) -> Exception:
        """An unforeseen error, as of memory, may leave the run half-changed: then it is forgotten here."""
        foreseen = isinstance(error, BadRequest | NotFound | OperationFailed) or is_device_lost(error)
        if foreseen or work.operation is None or not work.operation.changes_state:
            return error
        log.error("%s failed; its run is to be opened again", kind_of(work.operation), exc_info=error)
        self._engine.remove_run(work.run_id)
        name = type(error).__name__
        return OperationFailed(f"{name}: {error}", name, state_lost=True)

    def _begin_snapshot(self, ticket: int, command: Snapshot) -> None:
        if self._snapshots.is_busy:
            raise OperationFailed("another run's snapshot is being written", "Busy")
        started = time.monotonic()
        write = self._engine.begin_snapshot(command.run_id, self._staging.to_write(command.write_to))

        def write_whole() -> None:
            write()
            self._staging.written(command.write_to)

        self._snapshots.begin(ticket, write_whole, time.monotonic() - started)

    def report_snapshots(self) -> None:
        """Answer the call whose snapshot has been written meanwhile."""
        finished = self._snapshots.take_finished()
        if finished is not None:
            ticket, written = finished
            self._replies.guard(ticket, lambda: self._replies.reply(ticket, written.result()))

    def _begin(self, works: list[_Work]) -> None:
        for work in works:
            if not work.has_begun and isinstance(work.command, Execute):
                self._replies.begin(work.ticket)
            work.has_begun = True

    def _charge(self, work: _Work, seconds: float) -> None:
        work.spent_s += seconds
        self._turns.charge(work.run_id, seconds)

    def _answer(self, work: _Work, request: LossRequest) -> None:
        result = attempt(request.result)
        if isinstance(result, Exception):
            self._refuse(work, result)
        else:
            self._reply(work, result)

    def _reply(self, work: _Work, result: Result) -> None:
        self._leave(work)
        result = msgspec.structs.replace(result, spent=Spent(work.spent_s, work.num_tokens))
        self._replies.reply(work.ticket, result)

    def _refuse(self, work: _Work, error: Exception) -> None:
        self._leave(work)
        self._replies.refuse(work.ticket, error)

    def _leave(self, work: _Work) -> None:
        queue = self._queues[work.run_id]
        assert queue[0] is work
        queue.popleft()
        if not queue:
            del self._queues[work.run_id]
            self._turns.leave(work.run_id)
            if not isinstance(work.command, CloseRun):
                self._answered_at[work.run_id] = time.monotonic()


def _waits_for_its_first_pass(work: _Work) -> bool:
    return isinstance(work.operation, Forward | ForwardBackward) and not work.has_begun and not work.alone


@contextmanager
def _about(run_id: str) -> Generator[None]:
    """Log lines are the run's."""
    bind_only(Scope(run_id=run_id))
    try:
        yield
    finally:
        bind_only(Scope())
