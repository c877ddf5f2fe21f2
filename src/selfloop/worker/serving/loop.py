"""The worker's one loop, in one thread: receive, then give the device to the kind of work whose turn it is."""

import logging
import math
import os
import time

import zmq

from selfloop.engine.backends.device import give_back_freed_memory
from selfloop.worker.protocol import (
    Call,
    CancelSample,
    CloseRun,
    Detokenize,
    Dying,
    Execute,
    OpenRun,
    RenderChat,
    Sample,
    Shutdown,
    Snapshot,
    Tokenize,
    call_decoder,
)
from selfloop.worker.serving.background import Heartbeats
from selfloop.worker.serving.fair_share import FairShare
from selfloop.worker.serving.replies import Replies
from selfloop.worker.serving.sampling import SamplingQueue
from selfloop.worker.serving.training import TrainingQueue
from selfloop.worker.text.calls import TextQueue

log = logging.getLogger("selfloop.worker")

_IDLE_POLL_MS = 1000
# While a snapshot is being written, whose end is to be reported.
_WRITING_POLL_MS = 10
# It takes 10 to 20 ms of a heap of 3 GiB.
_TIDY_EVERY_S = 30.0
_TRAINING, _SAMPLING = "training", "sampling"


class Worker:
    """Brings each call to the queue that it is for; those of training and sampling share the device.

    Args:
        training_share: part of the device's time that training gets while there is sampling to do, too.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        replies: Replies,
        heartbeats: Heartbeats,
        training: TrainingQueue,
        sampling: SamplingQueue,
        text: TextQueue,
        *,
        training_share: float,
    ) -> None:
        self._socket = socket
        self._replies = replies
        self._heartbeats = heartbeats
        self._training = training
        self._sampling = sampling
        self._text = text
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(text.finished_file, zmq.POLLIN)
        self._shares: FairShare[str] = FairShare()
        self._training_share = training_share
        self._stopping = False
        self._tidied_at = time.monotonic()

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # The process's edge: a device that is lost, or an error of our own.
            log.critical("the worker ends itself", exc_info=error)
            self._replies.send(Dying(f"worker process ended itself: {type(error).__name__}: {error}"))
            self._socket.close(linger=2000)
            # Not through the interpreter's exit: the device's own clean-up can hang on what broke it.
            os._exit(1)

    def _run(self) -> None:
        while not self._stopping:
            self._receive()
            self._training.report_snapshots()
            self._note(_TRAINING, self._training.has_work, self._training_share)
            self._note(_SAMPLING, self._sampling.has_work, 1 - self._training_share)
            for kind in self._shares.in_turn()[:1]:
                started = time.monotonic()
                with self._heartbeats.at_work():
                    if kind == _TRAINING:
                        self._training.step()
                    else:
                        self._sampling.step()
                self._shares.charge(kind, time.monotonic() - started)
                self._tidy()

    def _tidy(self) -> None:
        """A crowd of operations must not leave the process as large as it was at its height."""
        now = time.monotonic()
        if now - self._tidied_at >= _TIDY_EVERY_S:
            give_back_freed_memory()
            self._tidied_at = now

    def _note(self, kind: str, has_work: bool, share: float) -> None:
        if has_work:
            self._shares.join(kind, share)
        else:
            self._shares.leave(kind)

    def _receive(self) -> None:
        while ready := dict(self._poller.poll(self._patience_ms())):
            if self._text.finished_file in ready:
                self._text.send_finished()
            if self._socket in ready:
                frames = self._socket.recv_multipart()
                self._accept(call_decoder.decode(frames[0]), frames[1])

    def _patience_ms(self) -> int:
        if self._sampling.has_work:
            return 0
        if self._training.has_work:
            return math.ceil(1000 * self._training.patience_s())
        return _WRITING_POLL_MS if self._training.is_writing else _IDLE_POLL_MS

    def _accept(self, call: Call, payload: bytes) -> None:
        match call.command:
            case OpenRun() | CloseRun() | Execute() | Snapshot() as command:
                self._training.take(call, command, payload)
            case Sample() as command:
                self._sampling.take(call.ticket, command)
            case CancelSample(request_id):
                self._sampling.cancel(call.ticket, request_id)
            case Tokenize() | Detokenize() | RenderChat() as command:
                self._replies.guard(call.ticket, lambda: self._text.take(call.ticket, command))
            case Shutdown():
                self._stopping = True
