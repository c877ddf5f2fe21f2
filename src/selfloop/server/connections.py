"""Connections that stand still are let go: each is a file of ours, and some of our memory."""

import asyncio
import socket
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from selfloop.server.errors import body_for

HEAD_PATIENCE_S = 30.0
"""How long the head of a request may take to come, from the connection or from its first byte."""

# A peer that takes none of what we send, or answers no probe, for so long is gone; the system then closes.
_UNREAD_MS = 120_000
_PROBE_AFTER_S, _PROBE_EVERY_S, _NUM_PROBES = 60, 20, 3


class PatientConnection(HttpToolsProtocol):
    """Uvicorn's connection, which by itself waits for ever for the rest of a request's head, and for readers."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _give_up_on_the_gone(transport.get_extra_info("socket"))
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not HTTP as RFC 9112 has it, or bytes other than ASCII in the request's line", "BAD_REQUEST")

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Answer what has not become a request, and close."""
        path = getattr(self, "url", b"").partition(b"?")[0].decode("latin-1")
        body = msgspec.json.encode(body_for(path, status, message, reason))
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            "x-content-type-options: nosniff\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_PATIENCE_S, self.transport.close)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _give_up_on_the_gone(connection: Any) -> None:
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_AFTER_S),
        ("TCP_KEEPINTVL", _PROBE_EVERY_S),
        ("TCP_KEEPCNT", _NUM_PROBES),
        ("TCP_USER_TIMEOUT", _UNREAD_MS),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
