"""Saves of a run's weights that are none of its operations: no place in its order is taken for them."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from selfloop.control.queue.outcomes import Outcomes
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import OperationFailed
from selfloop.types.operation import SaveWeightsForSampler
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import Execute


@dataclass(slots=True)
class _Save:
    operation: SaveWeightsForSampler
    reply: "asyncio.Future[bytes]"


class SavesBeside:
    """Those that a run is asked for; its actor sends them between two operations. Nothing here outlives a restart."""

    def __init__(self, run: RunRow, outcomes: Outcomes, on_asked: Callable[[], None]) -> None:
        self._run = run
        self._outcomes = outcomes
        self._on_asked = on_asked
        self._waiting: deque[_Save] = deque()
        self._ended = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    async def ask(self, operation: SaveWeightsForSampler) -> bytes:
        """Write the run's weights as they are by now.

        Returns:
            The msgpack of the result; its folder is yet to be published.

        Raises:
            OperationFailed: it could not be written, or the run cannot be brought up, or ends.
            WorkerLost: the worker died meanwhile; nothing was written.
        """
        if self._ended:
            raise _run_ended()
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Save(operation, reply))
        self._on_asked()
        return await reply

    async def send(self, worker: WorkerClient) -> None:
        """Have the worker carry out all that wait, behind what it was sent before."""
        while self._waiting:
            save = self._waiting[0]
            if not save.reply.done():  # Whoever asked may have gone.
                await self._send_one(worker, save)
            self._waiting.popleft()

    async def _send_one(self, worker: WorkerClient, save: _Save) -> None:
        try:
            write_to = await self._outcomes.write_to(self._run, save.operation)
        except OperationFailed as error:
            if not save.reply.done():
                save.reply.set_exception(error)
            return
        command = Execute(self._run.id, self._run.seed, write_to=write_to)
        answer = worker.call(command, msgspec.msgpack.encode(save.operation))
        answer.add_done_callback(partial(_pass_on, save.reply))

    def refuse(self, error: OperationFailed) -> None:
        """None that waits can be carried out."""
        while self._waiting:
            reply = self._waiting.popleft().reply
            if not reply.done():
                reply.set_exception(error)

    def end(self) -> None:
        """The run's actor ends: nothing is sent any more."""
        self._ended = True
        self.refuse(_run_ended())


def _run_ended() -> OperationFailed:
    return OperationFailed("the run ended before its weights were saved", "Cancelled")


def _pass_on(reply: "asyncio.Future[bytes]", answer: "asyncio.Future[bytes]") -> None:
    if answer.cancelled():
        reply.cancel()
        return
    error = answer.exception()  # Asked for in any case: that marks it as seen.
    if reply.done():
        return
    if error is None:
        reply.set_result(answer.result())
    else:
        reply.set_exception(error)
