"""Clients that begin and never end: a real server, real sockets that stall."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI, Request

from selfloop.server import connections, errors, limits
from selfloop.server.connections import PatientConnection
from selfloop.server.limits import BodyLimit


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    monkeypatch.setattr(connections, "HEAD_PATIENCE_S", 0.3)
    monkeypatch.setattr(limits, "BODY_PATIENCE_S", 0.3)
    app = FastAPI()
    errors.install(app)
    app.add_middleware(BodyLimit)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", http=PatientConnection, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


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
