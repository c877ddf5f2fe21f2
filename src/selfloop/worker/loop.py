"""The worker's one loop, in one thread: receive, then give the device to whichever kind of work had less of it."""

import time

import zmq

from selfloop.worker.drawing import SamplingDesk
from selfloop.worker.outbox import Outbox
from selfloop.worker.protocol import (
    Call,
    CancelSample,
    CloseRun,
    Detokenize,
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

_IDLE_POLL_MS = 1000


class Worker:
    """Brings each call to the desk that it is for; the desks of training and sampling share the device."""

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        outbox: Outbox,
        training: TrainingDesk,
        sampling: SamplingDesk,
        text: TextDesk,
    ) -> None:
        self._socket = socket
        self._outbox = outbox
        self._training = training
        self._sampling = sampling
        self._text = text
        self._train_s = 0.0
        self._sample_s = 0.0
        self._stopping = False

    def run(self) -> None:
        while not self._stopping:
            self._receive()
            training, sampling = self._training.has_work, self._sampling.has_work
            if training and sampling:
                self._share()
            elif training:
                self._train_s = self._sample_s = 0.0
                self._training.step()
            elif sampling:
                self._train_s = self._sample_s = 0.0
                self._sampling.step()

    def _share(self) -> None:
        # Equal time to each while both have work, so that neither starves.
        started = time.monotonic()
        if self._train_s <= self._sample_s:
            self._training.step()
            self._train_s += time.monotonic() - started
        else:
            self._sampling.step()
            self._sample_s += time.monotonic() - started

    def _receive(self) -> None:
        busy = self._training.has_work or self._sampling.has_work
        while self._socket.poll(0 if busy else _IDLE_POLL_MS):
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
