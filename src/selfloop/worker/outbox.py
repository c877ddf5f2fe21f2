"""What the worker says to its gateway."""

import logging
from collections.abc import Callable

import zmq

from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.worker.protocol import Event, Reply, ReplyError, encode

log = logging.getLogger("selfloop.worker")


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
            self.send(ReplyError(ticket, str(error), getattr(error, "error_class", type(error).__name__)))
            return
        log.error("call %d failed", ticket, exc_info=error)
        self.send(ReplyError(ticket, f"{type(error).__name__}: {error}", type(error).__name__))

    def guard(self, ticket: int, act: Callable[[], None]) -> None:
        """Do what a call asks; whatever it raises is its answer."""
        try:
            act()
        except Exception as error:  # The worker's edge: one bad call must not end every run it holds.
            self.refuse(ticket, error)
