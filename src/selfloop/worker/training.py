"""Calls about runs: each run's in the order they were sent, runs in turn."""

import time
from collections import deque
from pathlib import Path

import msgspec

from selfloop.engine.engine import Engine
from selfloop.types.logline import Scope, bind_only
from selfloop.types.operation import Forward, ForwardBackward, Operation
from selfloop.types.result import Spent
from selfloop.worker.operations import carry_out, open_run
from selfloop.worker.outbox import Outbox
from selfloop.worker.protocol import Begun, Call, CloseRun, Execute, OpenRun, Reply, Snapshot, encode

_operation_decoder: "msgspec.msgpack.Decoder[Operation]" = msgspec.msgpack.Decoder(Operation)

RunCommand = OpenRun | CloseRun | Execute | Snapshot


class TrainingDesk:
    """The queues of all runs."""

    def __init__(self, engine: Engine, outbox: Outbox) -> None:
        self._engine = engine
        self._outbox = outbox
        self._queues: dict[str, deque[tuple[Call, bytes]]] = {}
        self._turns: deque[str] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._turns)

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
            case Snapshot(run_id, write_to):
                self._engine.snapshot(run_id, Path(write_to))
            case Execute() as execute:
                self._outbox.send(Begun(call.ticket))
                operation = _operation_decoder.decode(payload)
                started = time.monotonic()
                result = carry_out(self._engine, execute, operation)
                spent = Spent(time.monotonic() - started, _num_tokens(operation))
                body = encode(msgspec.structs.replace(result, spent=spent))
            case other:
                raise AssertionError(other)
        self._outbox.send(Reply(call.ticket), body)


def _num_tokens(operation: Operation) -> int:
    """Tokens that an operation sends through the model."""
    if isinstance(operation, Forward | ForwardBackward):
        return sum(datum.tokens.num_elements for datum in operation.data)
    return 0
