"""Heads without end, heads that are too long, and crowds that send none: a real server, real sockets."""

import asyncio
from collections.abc import AsyncIterator

import psutil
import pytest
import uvicorn
from fastapi import FastAPI, Request

from selfloop.server import errors
from selfloop.server.middleware.body_limit import BodyLimit
from selfloop.server.middleware.connections import MAX_HEAD_BYTES, BoundedConnection
from selfloop.server.middleware.dialects import RequestDialect
from selfloop.server.middleware.unauthenticated import Unauthenticated
from selfloop.server.shared.dialect import Dialect, Dialects

START = b"GET /name HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = 64 * 1024


@pytest.fixture
async def port() -> AsyncIterator[int]:
    app = FastAPI()
    dialects = Dialects([], rest=Dialect("server"))
    errors.install(app, dialects)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestDialect, dialects=dialects)

    @app.get("/name")
    async def name(request: Request) -> str:
        return request.headers["host"]

    @app.post("/size")
    async def size(request: Request) -> list[object]:
        await request.body()
        return [len(await request.body()), request.headers.get("x-late")]

    config = uvicorn.Config(app, port=0, log_level="critical", http=BoundedConnection, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def answer_to(port: int, *parts: bytes, times: int = 1) -> bytes:
    """What the server says; the last part is sent ``times``, or until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts[:-1]:
            writer.write(part)
        for _ in range(times):
            writer.write(parts[-1])
            await writer.drain()
    except ConnectionError:
        pass
    try:
        async with asyncio.timeout(5):
            return await reader.read(4096)
    except ConnectionError:
        return b"<reset>"
    finally:
        writer.close()


ENDLESS = {
    "a value": (START + b"X: ", b"v" * PIECE),
    "a name": (START, b"n" * PIECE),
    "headers": (START, b"X-Many: of these\r\n" * 4096),
    "a target": (b"GET /", b"t" * PIECE),
    "nothing": (b"", b"\r\n" * PIECE),
    "an extension of a chunk": (CHUNKED + b"1;", b"e" * PIECE),
    "a field behind the body": (CHUNKED + b"1\r\nx\r\n0\r\nX-Late: ", b"v" * PIECE),
    "fields behind the body": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X-Late: of these\r\n" * 4096),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_never_ends_is_ended_at_the_limit(port: int, what: str) -> None:
    start, more = ENDLESS[what]
    before = psutil.Process().memory_info().rss
    answer = await answer_to(port, start, more, times=400)
    assert answer.split(b" ")[1:2] in ([b"431"], [b"414"]) or answer in (b"", b"<reset>"), answer
    assert psutil.Process().memory_info().rss - before < 20 * 2**20, "of 25 MiB or more that were offered"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (START + b"X: " + b"v" * (MAX_HEAD_BYTES - 200) + b"\r\n\r\n", b"200"),
        (START + b"X: " + b"v" * MAX_HEAD_BYTES + b"\r\n\r\n", b"431"),
        (START + b"X: y\r\n" * (MAX_HEAD_BYTES // 5) + b"\r\n", b"431"),
        (b"GET /name?" + b"q" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
        (b"GET /name?" + b"q" * (MAX_HEAD_BYTES - 1000) + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (START + b"Host: y\r\n\r\n", b"400"),
        (b"GET /name\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
    ],
)
async def test_a_head_is_taken_up_to_the_limit(port: int, head: bytes, status: bytes) -> None:
    for pieces in ([head], [head[at : at + 1000] for at in range(0, len(head), 1000)]):
        answer = await answer_to(port, *pieces)
        assert answer.split(b" ")[1] == status, answer
        if status != b"200":
            assert b'"reason":' in answer


async def test_an_absolute_target_names_the_host(port: int) -> None:
    answer = await answer_to(port, b"GET http://Evil.example:80/name HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.endswith(b'"Evil.example:80"'), answer
    answer = await answer_to(port, b"GET http://[::1]:80/name HTTP/1.1\r\n\r\n")
    assert answer.endswith(b'"[::1]:80"'), answer


async def test_what_stands_behind_a_body_is_no_header(port: int) -> None:
    answer = await answer_to(port, CHUNKED + b"1;ext=1\r\nx\r\n0\r\nX-Late: 1\r\n\r\n")
    assert answer.endswith(b"[1,null]"), answer


async def test_a_large_body_and_pipelined_requests_are_no_head(port: int) -> None:
    body = b"x" * (3 * 2**20)
    chunks = b"".join(b"400;a=b\r\n" + body[at : at + 1024] + b"\r\n" for at in range(0, len(body), 1024))
    assert (await answer_to(port, CHUNKED + chunks + b"0\r\n\r\n")).endswith(b"[3145728,null]")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write((START + b"X: " + b"v" * 1000 + b"\r\n\r\n") * 100)
    answer = b""
    async with asyncio.timeout(20):
        while answer.count(b"HTTP/1.1 200") < 100:
            part = await reader.read(65536)
            assert part, answer
            answer += part
    writer.close()


class Waiting:
    def __init__(self) -> None:
        self.is_gone = False

    def give_up(self) -> None:
        self.is_gone = True


def test_a_crowd_of_one_address_makes_room() -> None:
    waiting = Unauthenticated[Waiting](max_waiting=10, max_bytes=100)
    honest = Waiting()
    waiting.wait(honest, "10.0.0.1")
    crowd = [Waiting() for _ in range(30)]
    for each in crowd:
        waiting.wait(each, "10.0.0.2")
    assert not honest.is_gone
    assert [each.is_gone for each in crowd] == [True] * 21 + [False] * 9
    for each in crowd[21:]:
        waiting.grow(each, 20)
    assert sum(each.is_gone for each in crowd) == 25
    waiting.grow(honest, 10)
    assert not honest.is_gone
    assert waiting.num_bytes <= 100
    for each in (honest, *crowd):
        waiting.leave(each)
    assert (len(waiting), waiting.num_bytes) == (0, 0)
