"""The worker's one loop, in one thread: receive, then give the device to whichever kind of work had less of it."""

import logging
import os
import time

import zmq

from selfloop.worker.background import Pulse
from selfloop.worker.drawing import SamplingDesk
from selfloop.worker.outbox import Outbox
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
from selfloop.worker.text import TextDesk
from selfloop.worker.training import TrainingDesk

log = logging.getLogger("selfloop.worker")

_IDLE_POLL_MS = 1000
# While a snapshot is being written, whose end is to be told.
_WRITING_POLL_MS = 10


class Worker:
    """Brings each call to the desk that it is for; the desks of training and sampling share the device."""

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        outbox: Outbox,
        pulse: Pulse,
        training: TrainingDesk,
        sampling: SamplingDesk,
        text: TextDesk,
    ) -> None:
        self._socket = socket
        self._outbox = outbox
        self._pulse = pulse
        self._training = training
        self._sampling = sampling
        self._text = text
        self._train_s = 0.0
        self._sample_s = 0.0
        self._stopping = False

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # The process's edge: a device that is lost, or an error of our own.
            log.critical("the worker ends itself", exc_info=error)
            self._outbox.send(Dying(f"worker process ended itself: {type(error).__name__}: {error}"))
            self._socket.close(linger=2000)
            # Not through the interpreter's exit: the device's own clean-up can hang on what broke it.
            os._exit(1)

    def _run(self) -> None:
        while not self._stopping:
            self._receive()
            self._training.tell_of_snapshots()
            training, sampling = self._training.has_work, self._sampling.has_work
            if training and sampling:
                self._share()
            elif training:
                self._train_s = self._sample_s = 0.0
                self._train()
            elif sampling:
                self._train_s = self._sample_s = 0.0
                self._sample()

    def _share(self) -> None:
        # Equal time to each while both have work, so that neither starves.
        started = time.monotonic()
        if self._train_s <= self._sample_s:
            self._train()
            self._train_s += time.monotonic() - started
        else:
            self._sample()
            self._sample_s += time.monotonic() - started

    def _train(self) -> None:
        with self._pulse.at_work():
            self._training.step()

    def _sample(self) -> None:
        with self._pulse.at_work():
            self._sampling.step()

    def _receive(self) -> None:
        busy = self._training.has_work or self._sampling.has_work
        idle_ms = _WRITING_POLL_MS if self._training.is_writing else _IDLE_POLL_MS
        while self._socket.poll(0 if busy else idle_ms):
            frames = self._socket.recv_multipart()
            self._accept(call_decoder.decode(frames[0]), frames[1])
            busy = True

    def _accept(self, call: Call, payload: bytes) -> None:
        match call.command:
            case OpenRun() | CloseRun() | Execute() | Snapshot() as command:
                self._training.take(call, command, payload)
            case Sample() as command:
                self._sampling.take(call.ticket, command)
            case CancelSample(request_id):
                self._sampling.cancel(call.ticket, request_id)
            case Tokenize() | Detokenize() | RenderChat() as command:
                self._outbox.guard(call.ticket, lambda: self._outbox.reply(call.ticket, self._text.answer(command)))
            case Shutdown():
                self._stopping = True
