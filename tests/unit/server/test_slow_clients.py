"""Clients that begin and never end: a real server, real sockets that stall."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from selfloop.server import errors
from selfloop.server.middleware import connections
from selfloop.server.middleware.body_limit import BodyLimit
from selfloop.server.middleware.connections import BoundedConnection
from selfloop.server.middleware.dialects import RequestDialect
from selfloop.server.shared import body
from selfloop.server.shared.dialect import Dialect, Dialects

CHUNK_BYTES = 64 * 1024
LARGE_BYTES = 64 * 2**20
# Of Linux: closes without a word to the other side, as a machine does that loses its power.
TCP_REPAIR = 19


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[uvicorn.Server]:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connections, "_PROBE_AFTER_S", 1)
    monkeypatch.setattr(connections, "_PROBE_EVERY_S", 1)
    monkeypatch.setattr(connections, "_UNREAD_MS", 1000)
    app = FastAPI()
    dialects = Dialects([], rest=Dialect("server"))
    errors.install(app, dialects)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestDialect, dialects=dialects)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.get("/large")
    async def large(num_bytes: int) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(num_bytes // CHUNK_BYTES):
                app.state.num_sent_bytes += CHUNK_BYTES
                yield b"x" * CHUNK_BYTES

        app.state.num_sent_bytes = 0
        return StreamingResponse(chunks())

    @app.get("/poll")
    async def poll(request: Request) -> None:
        app.state.polls.append(request)
        while not await request.is_disconnected():  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.05)

    app.state.polls = []
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", http=BoundedConnection, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    yield server
    server.should_exit = True
    await serving


@pytest.fixture
def port(server: uvicorn.Server) -> int:
    return server.servers[0].sockets[0].getsockname()[1]


async def said_to(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """All that the server says until it closes, or for two seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause_s)
    answer = b""
    try:
        async with asyncio.timeout(2):
            while chunk := await reader.read(1000):
                answer += chunk
    except TimeoutError:
        answer += b"<still open>"
    writer.close()
    return answer


HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


async def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    assert await said_to(port) == b""


async def test_a_head_that_never_ends_is_closed(port: int) -> None:
    assert await said_to(port, HEAD[:21]) == b""
    assert await said_to(port, HEAD[:21], b"X-A: ", b"1\r\n", pause_s=0.2) == b"", "a trickle does not help"


async def test_a_body_that_stalls_is_answered_with_408(port: int) -> None:
    answer = await said_to(port, HEAD + b"12")
    assert answer.startswith(b"HTTP/1.1 408"), answer
    assert b"nothing of the body came" in answer


async def test_a_slow_but_living_client_is_served_and_its_connection_kept(port: int) -> None:
    answer = await said_to(port, HEAD + b"1", b"2", b"34", HEAD + b"1234", pause_s=0.2)
    assert answer.count(b"HTTP/1.1 200") == 2, answer
    assert answer.endswith(b"<still open>"), "idle between requests is another matter"


async def all_gone(server: uvicorn.Server) -> None:
    """Wait until the server has let go of every connection."""
    async with asyncio.timeout(15):
        while server.server_state.connections:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.05)


async def test_a_client_that_is_gone_without_a_word_is_let_go(server: uvicorn.Server, port: int) -> None:
    """It waits for a poll, and neither end nor reset comes from it any more: a probe finds it out."""
    polls = server.config.app.state.polls
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /poll HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            while not polls:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.02)
        assert len(server.server_state.connections) == 1
        try:
            client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except PermissionError:
            pytest.skip("closing without a word takes CAP_NET_ADMIN")
    await all_gone(server)


async def test_a_client_that_reads_nothing_is_let_go_and_costs_little(server: uvicorn.Server, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET /large?num_bytes={LARGE_BYTES} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await asyncio.sleep(0.3)
        assert len(server.server_state.connections) == 1
        made = server.config.app.state.num_sent_bytes
        assert CHUNK_BYTES < made < LARGE_BYTES / 2, "it is made as it is read, and not kept for whom does not read"
        await all_gone(server)


async def test_a_client_that_reads_slowly_gets_all_of_a_large_answer(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK_BYTES)
    writer.write(f"GET /large?num_bytes={LARGE_BYTES // 4} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    received, pauses = 0, 30
    while chunk := await reader.read(CHUNK_BYTES):
        received += chunk.count(b"x")
        if pauses:
            pauses -= 1
            await asyncio.sleep(0.1)
    writer.close()
    # One more stands in a header's name.
    assert LARGE_BYTES // 4 <= received <= LARGE_BYTES // 4 + 100
