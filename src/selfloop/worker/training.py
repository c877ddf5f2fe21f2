"""Calls about runs: each run's in the order they were sent, runs in turn."""

import logging
import time
from collections import deque
from pathlib import Path

import msgspec

from selfloop.engine.engine import Engine
from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.types.logline import Scope, bind_only
from selfloop.types.operation import CHANGES_STATE, Forward, ForwardBackward, Operation, kind_of
from selfloop.types.result import Result, Spent
from selfloop.worker.background import SnapshotWriter
from selfloop.worker.operations import carry_out, open_run
from selfloop.worker.outbox import Outbox, is_device_lost
from selfloop.worker.protocol import Begun, Call, CloseRun, Execute, OpenRun, Reply, Snapshot, Written, encode

log = logging.getLogger("selfloop.worker")

_operation_decoder: "msgspec.msgpack.Decoder[Operation]" = msgspec.msgpack.Decoder(Operation)

RunCommand = OpenRun | CloseRun | Execute | Snapshot


class TrainingDesk:
    """The queues of all runs."""

    def __init__(self, engine: Engine, outbox: Outbox) -> None:
        self._engine = engine
        self._outbox = outbox
        self._queues: dict[str, deque[tuple[Call, bytes]]] = {}
        self._turns: deque[str] = deque()
        self._snapshots = SnapshotWriter()

    @property
    def has_work(self) -> bool:
        return bool(self._turns)

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is being written beside the work."""
        return self._snapshots.is_busy

    def take(self, call: Call, command: RunCommand, payload: bytes) -> None:
        queue = self._queues.setdefault(command.run_id, deque())
        queue.append((call, payload))
        if len(queue) == 1:
            self._turns.append(command.run_id)

    def step(self) -> None:
        """Carry out the next call of the run whose turn it is."""
        run_id = self._turns.popleft()
        bind_only(Scope(run_id=run_id))
        queue = self._queues[run_id]
        call, payload = queue.popleft()
        if queue:
            self._turns.append(run_id)
        else:
            del self._queues[run_id]
        self._outbox.guard(call.ticket, lambda: self._perform(call, payload))
        bind_only(Scope())

    def _perform(self, call: Call, payload: bytes) -> None:
        body = b""
        match call.command:
            case OpenRun() as command:
                open_run(self._engine, command)
            case CloseRun(run_id):
                self._engine.remove_run(run_id)
            case Snapshot(background=True) as snapshot:
                self._begin_snapshot(call.ticket, snapshot)
                return  # Replied to once it is written.
            case Snapshot(run_id, write_to):
                started, cpu_s = time.monotonic(), time.thread_time()
                self._engine.snapshot(run_id, Path(write_to))
                body = encode(Written(time.monotonic() - started, time.thread_time() - cpu_s))
            case Execute() as execute:
                self._outbox.send(Begun(call.ticket))
                operation = _operation_decoder.decode(payload)
                started = time.monotonic()
                result = self._carry_out(execute, operation)
                spent = Spent(time.monotonic() - started, _num_tokens(operation))
                body = encode(msgspec.structs.replace(result, spent=spent))
            case other:
                raise AssertionError(other)
        self._outbox.send(Reply(call.ticket), body)

    def _carry_out(self, execute: Execute, operation: Operation) -> Result:
        """An unforeseen error, as of memory, may leave the run half-changed: then it is forgotten here."""
        try:
            return carry_out(self._engine, execute, operation)
        except (BadRequest, NotFound, OperationFailed):
            raise
        except Exception as error:
            if is_device_lost(error) or kind_of(operation) not in CHANGES_STATE:
                raise
            log.exception("%s failed; its run is to be opened again", kind_of(operation))
            self._engine.remove_run(execute.run_id)
            name = type(error).__name__
            raise OperationFailed(f"{name}: {error}", name, state_lost=True) from error

    def _begin_snapshot(self, ticket: int, command: Snapshot) -> None:
        if self._snapshots.is_busy:
            raise OperationFailed("another run's snapshot is being written", "Busy")
        started = time.monotonic()
        write = self._engine.begin_snapshot(command.run_id, Path(command.write_to))
        self._snapshots.begin(ticket, write, time.monotonic() - started)

    def tell_of_snapshots(self) -> None:
        """Answer the calls whose snapshot has been written meanwhile."""
        for finished in self._snapshots.take_finished():
            if finished.error is not None:
                self._outbox.refuse(finished.ticket, finished.error)
            else:
                self._outbox.reply(finished.ticket, finished.written)


def _num_tokens(operation: Operation) -> int:
    """Tokens that an operation sends through the model."""
    if isinstance(operation, Forward | ForwardBackward):
        return sum(datum.tokens.num_elements for datum in operation.data)
    return 0
