"""What the worker says to its gateway."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import zmq

from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.worker.protocol import Event, Reply, ReplyError, encode

log = logging.getLogger("selfloop.worker")

_Answer = TypeVar("_Answer")


class Outbox:
    """Sends events; turns what a call raises into its answer."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket

    def send(self, event: Event, body: bytes = b"") -> None:
        self._socket.send_multipart([encode(event), body])

    def reply(self, ticket: int, result: object) -> None:
        """Answer a call with a result."""
        self.send(Reply(ticket), encode(result))

    def refuse(self, ticket: int, error: Exception) -> None:
        """Answer a call with an error: one that a caller may see as it is, another with its type, and into the log."""
        if isinstance(error, BadRequest | NotFound | OperationFailed):
            error_class = getattr(error, "error_class", type(error).__name__)
            self.send(ReplyError(ticket, str(error), error_class, getattr(error, "state_lost", False)))
            return
        if is_device_lost(error):
            raise error
        log.error("call %d failed", ticket, exc_info=error)
        self.send(ReplyError(ticket, f"{type(error).__name__}: {error}", type(error).__name__))

    def guard(self, ticket: int, act: Callable[[], None]) -> None:
        """Do what a call asks; whatever it raises is its answer, but for the loss of the device, which ends us."""
        outcome = attempt(act)
        if isinstance(outcome, Exception):
            self.refuse(ticket, outcome)


def attempt(act: Callable[[], _Answer]) -> _Answer | Exception:
    """What ``act`` returns or raises."""
    try:
        return act()
    except Exception as error:  # The worker's edge: one bad call must not end every run it holds.
        return error


def is_device_lost(error: Exception) -> bool:
    """Whether every further call on the GPU fails, too: its errors stick to the process, but for a lack of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
