"""What the worker says to its gateway."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import zmq

from selfloop.types.errors import BadRequest, NotFound, OperationFailed, disk_full
from selfloop.worker.protocol import Event, Reply, ReplyError, encode

log = logging.getLogger("selfloop.worker")

_Answer = TypeVar("_Answer")


class Replies:
    """Sends events; turns what a call raises into its answer."""

    def __init__(self, socket: "zmq.Socket[bytes]", begun_path: Path) -> None:
        self._socket = socket
        self._begun: set[int] = set()
        self._begun_file = os.open(begun_path, os.O_WRONLY | os.O_CREAT, 0o600)

    def send(self, event: Event, body: bytes = b"") -> None:
        self._socket.send_multipart([encode(event), body])

    def begin(self, ticket: int) -> None:
        """Note that an operation has its turn: if the process dies before the answer, it is a suspect.

        In a file, and not as an event: those leave by another thread, which may die before it has sent them.
        """
        self._begun.add(ticket)
        os.pwrite(self._begun_file, b" ".join(b"%d" % t for t in sorted(self._begun)) + b"\n", 0)

    def reply(self, ticket: int, result: object) -> None:
        """Answer a call with a result."""
        self._begun.discard(ticket)
        self.send(Reply(ticket), encode(result))

    def refuse(self, ticket: int, error: Exception) -> None:
        """Answer a call with an error: one that a caller may see as it is, another with its type, and into the log."""
        self._begun.discard(ticket)
        if isinstance(error, BadRequest | NotFound | OperationFailed):
            error_class = getattr(error, "error_class", type(error).__name__)
            self.send(ReplyError(ticket, str(error), error_class, getattr(error, "state_lost", False)))
            return
        if is_device_lost(error):
            raise error
        if isinstance(error, OSError) and (full := disk_full(error)) is not None:
            log.warning("call %d: %s", ticket, full)
            self.send(ReplyError(ticket, str(full), full.error_class))
            return
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
