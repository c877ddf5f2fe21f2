"""The gateway's half of the worker: calls go out, answers come back as futures. Light: no torch here."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Callable

from selfloop.types.errors import CheckpointDamaged, OperationFailed, WorkerLost
from selfloop.types.sampling import SampleRequest
from selfloop.worker.launchers.base import WorkerEnd, WorkerHandle
from selfloop.worker.protocol import (
    Call,
    Capabilities,
    Command,
    Dying,
    Event,
    Execute,
    LoadFailed,
    Loading,
    ModelInfo,
    OpenRun,
    Partial,
    Ready,
    Reply,
    ReplyError,
    Sample,
    Shutdown,
    Snapshot,
)

log = logging.getLogger(__name__)

_STOP_GRACE_S = 20.0


class WorkerClient:
    """One worker that was launched, to its end.

    Every future it hands out ends: with the result's bytes, with :class:`OperationFailed` carrying the
    worker's own cause, or with :class:`WorkerLost` when the worker is gone.

    Args:
        on_loading: hears the stages of its load.
    """

    def __init__(self, handle: WorkerHandle, on_loading: Callable[[str], None]) -> None:
        self._handle = handle
        self._on_loading = on_loading
        self._tickets = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._streams: dict[int, asyncio.Queue[bytes | None]] = {}
        self._dying: str | None = None
        self._stopping = False
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(), name="worker-events")

    @property
    def address(self) -> str:
        """Which worker it is, for logs."""
        return self._handle.address

    @property
    def pid(self) -> int | None:
        """Its process, where that is one of this machine."""
        return self._handle.pid

    def call(self, command: Command, payload: bytes = b"") -> asyncio.Future[bytes]:
        """Send a command (also before ``ready``: it waits in the worker's queue)."""
        return self._send(next(self._tickets), command, payload)

    def _send(self, ticket: int, command: Command, payload: bytes = b"") -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.lost.done():
            future.set_exception(WorkerLost(self.lost.result()))
            return future
        is_ready = self.ready.done() and self.ready.exception() is None
        if is_ready and (refused := _refusal(command, self.ready.result())) is not None:
            future.set_exception(refused)
            return future
        self._waiting[ticket] = future
        self._handle.send(Call(ticket, command), payload)
        return future

    async def stream(self, command: Command) -> AsyncGenerator[bytes]:
        """Send a command that answers in parts; yields each part, then the answer itself.

        Raises:
            OperationFailed: the worker refused or failed, also after parts.
            WorkerLost: the worker ended.
        """
        parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        ticket = next(self._tickets)
        self._streams[ticket] = parts
        answer = self._send(ticket, command)
        answer.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            yield answer.result()
        finally:
            self._streams.pop(ticket, None)
            answer.add_done_callback(_retrieve)

    async def stop(self) -> None:
        """Ask the worker to exit, then make it."""
        self._stopping = True
        if not self.lost.done():
            self.call(Shutdown()).add_done_callback(_retrieve)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.lost), _STOP_GRACE_S)
        await self.kill("stopped")

    async def kill(self, reason: str) -> None:
        """End the worker now, and let go of everything it held."""
        await self._handle.kill(reason)
        await asyncio.wait({self._reading})

    async def _read(self) -> None:
        async for event, body in self._handle.events():
            self._take(event, body)
        self._lose(await self._handle.ended)

    def _take(self, event: Event, body: bytes) -> None:
        match event:
            case Reply(ticket):
                self._complete(ticket, lambda future: future.set_result(body))
            case ReplyError(ticket, error, error_class, state_lost):
                failure = _failure(error, error_class, state_lost=state_lost)
                self._complete(ticket, lambda future: future.set_exception(failure))
            case Partial(ticket):
                if ticket in self._streams:
                    self._streams[ticket].put_nowait(body)
            case Dying(cause):
                self._dying = cause
            case Loading(stage):
                self._on_loading(stage)
            case Ready(info):
                if not self.ready.done():
                    self.ready.set_result(info)
            case LoadFailed(cause, error_class):
                if not self.ready.done():
                    self.ready.set_exception(OperationFailed(cause, error_class))
                    self.ready.exception()

    def _complete(self, ticket: int, complete: Callable[[asyncio.Future[bytes]], None]) -> None:
        future = self._waiting.pop(ticket, None)
        if future is not None and not future.done():
            complete(future)

    def _lose(self, end: WorkerEnd) -> None:
        reason = "stopped" if self._stopping else self._dying or end.reason
        self.lost.set_result(reason)
        if not self.ready.done():
            self.ready.set_exception(WorkerLost(reason))
            self.ready.exception()
        for ticket, future in self._waiting.items():
            if not future.done():
                future.set_exception(WorkerLost(reason, begun=ticket in end.begun, by_kernel=end.by_kernel))
                _retrieve(future)
        self._waiting.clear()


def _failure(error: str, error_class: str, *, state_lost: bool) -> OperationFailed:
    """The worker's refusal, as the class that it was raised as."""
    if error_class == "CheckpointDamaged":
        return CheckpointDamaged(error)
    return OperationFailed(error, error_class, state_lost=state_lost)


def _retrieve(future: asyncio.Future[bytes]) -> None:
    # Marks the exception as seen: a caller that was cancelled will not come for it.
    if future.done() and not future.cancelled():
        future.exception()


def _refusal(command: Command, info: ModelInfo) -> OperationFailed | None:
    """Why this worker cannot do what a command asks; None where it can."""
    match command:
        case OpenRun() | Execute() | Snapshot() if not info.can.trains:
            return OperationFailed("the worker that serves this base model does not train", "Unsupported")
        case Sample() if not info.can.samples:
            return OperationFailed("the worker that serves this base model does not sample", "Unsupported")
        case Sample(request, stream):
            return _refusal_of_sample(request, info.can, stream=stream)
        case _:
            return None


def _refusal_of_sample(request: SampleRequest, can: Capabilities, *, stream: bool) -> OperationFailed | None:
    """As a worker refuses a field: its name, and what was expected."""
    if stream and not can.streams:
        return OperationFailed("stream: false, as this base model's worker does not stream", "BadRequest")
    if request.params.structured is not None and not can.structured_output:
        return OperationFailed("structured_outputs: none, as this base model's worker has no grammars", "BadRequest")
    if request.asks_about_prompt and not can.prompt_logprobs:
        return OperationFailed("prompt_logprobs: none, as this base model's worker scores no prompts", "BadRequest")
    if request.routes and not can.routes:
        unsaid = "null or false, as this base model's worker does not say which experts it chose"
        return OperationFailed(f"include_routed_experts: {unsaid}", "BadRequest")
    return None
