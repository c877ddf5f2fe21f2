"""Connections are bounded: how long they may stand still, how long a head may be, how many may wait without a key.

Each is a file of ours, and some of our memory, before anybody knows who is there.
"""

import asyncio
import socket
from typing import Any, ClassVar

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from selfloop.server.middleware.unauthenticated import Unauthenticated
from selfloop.server.shared.dialect import Dialects

HEAD_TIMEOUT_S = 30.0
"""How long the head of a request may take to come, from the connection or from its first byte."""
MAX_HEAD_BYTES = 64 * 1024
"""Of the request's line and its headers; also of what frames one chunk of a body, and of what follows the last."""

# The parser keeps a field until it is whole, so what it is given at once is little beside the limit.
_FED_BYTES = 16 * 1024
# Of a body that nobody reads any more.
_MAX_UNREAD_BYTES = 64 * 2**20
# A peer that takes none of what we send, or answers no probe, for so long is gone; the system then closes.
_UNREAD_MS = 120_000
_PROBE_AFTER_S, _PROBE_EVERY_S, _NUM_PROBES = 60, 20, 3
_MALFORMED = 400, "BAD_REQUEST", "not HTTP as RFC 9112 has it, or bytes other than ASCII in the request's line"
_LONG_TARGET = 414, "URI_TOO_LONG", f"the request's line is longer than {MAX_HEAD_BYTES} bytes"
_LONG_HEAD = 431, "HEADERS_TOO_LARGE", f"the request's line and headers are longer than {MAX_HEAD_BYTES} bytes"
_LONG_FRAME = 431, "HEADERS_TOO_LARGE", f"more than {MAX_HEAD_BYTES} bytes between two chunks of the body, or behind it"
_CROWDED = 503, "CROWDED", "too many connections wait without having shown a key"


class _RefusedError(Exception):
    """Ends the parser's work; the answer is the connection's ``_refusal``."""


class BoundedConnection(HttpToolsProtocol):
    """Uvicorn's connection, which by itself waits for ever for the rest of a request's head, and for readers.

    And takes heads of any length, in a time that grows with their square.
    """

    unauthenticated: ClassVar = Unauthenticated["BoundedConnection"]()

    _head_timer: asyncio.TimerHandle | None = None
    _is_in_head = True
    _num_framing = 0
    _num_unread = 0
    _refusal = _MALFORMED

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _give_up_on_the_gone(transport.get_extra_info("socket"))
        self._await_head()
        self.unauthenticated.wait(self, self._address)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser little by little, so that it holds no more than the limit of anything unfinished."""
        for at in range(0, len(data), _FED_BYTES):
            if self.transport.is_closing():
                return
            piece = data[at : at + _FED_BYTES]
            self._num_framing += len(piece)
            super().data_received(piece)
            if self._num_framing > MAX_HEAD_BYTES and not self.transport.is_closing():
                # Nothing of it has become a whole head, or a byte of a body.
                is_target = self._is_in_head and len(getattr(self, "url", b"")) > MAX_HEAD_BYTES // 2
                self._refuse(_LONG_TARGET if is_target else _LONG_HEAD if self._is_in_head else _LONG_FRAME)
            elif self._is_in_head:
                self.unauthenticated.grow(self, self._num_framing)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._num_framing, self._num_unread = True, 0, 0
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows a body is none of the head any more, which has been acted on.
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_here()
        self._is_in_head, self._num_framing = False, 0
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _LONG_TARGET if len(self.url) > MAX_HEAD_BYTES // 2 else _LONG_HEAD
            raise _RefusedError
        _check_host(self.url, self.headers)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_framing = 0
        if self.cycle.response_complete:
            # A client that was refused mostly sends on, and reads then: a reset would lose it the answer.
            self._num_unread += len(body)
            if self._num_unread > _MAX_UNREAD_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head, self._num_framing = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_unauthenticated = "caller" not in self.cycle.scope.get("state", {})
        super().on_response_complete()
        if is_unauthenticated and self.cycle.response_complete and not self.transport.is_closing():
            self.unauthenticated.wait(self, self._address)
            if self.cycle.more_body:
                self._await_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def give_up(self) -> None:
        """Make room for others."""
        if self._num_framing:
            self._refuse(_CROWDED)
        else:
            self.transport.close()

    @property
    def _dialects(self) -> Dialects:
        app: Any = self.config.app
        return app.state.dialects

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _refuse(self, refusal: tuple[int, str, str]) -> None:
        """Answer what has not become a request, and close."""
        self._head_is_here()
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle  # None before the first request, whatever its type says.
        if cycle is None or cycle.response_complete:
            status, reason, message = refusal
            path = getattr(self, "url", b"")[:1000].partition(b"?")[0].decode("latin-1")
            body = msgspec.json.encode(self._dialects.of(path).errors.plain_body(status, message, reason))
            head = (
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
                "x-content-type-options: nosniff\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _head_is_here(self) -> None:
        self.unauthenticated.leave(self)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _check_host(target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """One name at most; that of an absolute target goes before the header's (RFC 9112, 3.2)."""
    named = [header for header in headers if header[0] == b"host"]
    if len(named) > 1:
        raise _RefusedError
    if not target.startswith((b"/", b"*")):
        parsed: Any = httptools.parse_url(target)
        if not parsed.host:
            raise _RefusedError
        port = b"" if parsed.port is None else b":%d" % parsed.port
        name = b"[" + parsed.host + b"]" if b":" in parsed.host else parsed.host
        headers[:] = [(b"host", name + port), *(header for header in headers if header[0] != b"host")]


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
