"""More long polls than a script opens: all are held, all are answered, and what is too many harms nobody.

POLLS=10000 in the environment makes it as many; each is an open file here and in the gateway (``ulimit -Hn``).
"""

import asyncio
import os
import resource
from collections.abc import Callable

import httpx
import psutil

from gateway import KEY, Gateway, Run, datum, is_gone, ok, until, words

NUM_POLLS = int(os.environ.get("POLLS", "1000"))
# Connections that the gateway takes at a time while the machine is busy.
_AT_ONCE = 100


def waiting_operation(run: Run) -> str:
    """One behind a gap: it has no result before the operation that is missing."""
    run.seq += 1
    return run.submit("forward", data=[datum(words(1))], loss_fn="cross_entropy")


def request(run: Run, operation_id: str) -> bytes:
    return (
        f"GET {run.path}/operations/{operation_id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    )


async def polls_answered(own: Gateway, run: Run, operation_id: str, meanwhile: Callable[[], object]) -> list[bytes]:
    """The status line of each poll; ``meanwhile`` is called once all are open. One that is sent home asks again."""
    opened, dialling = asyncio.Semaphore(0), asyncio.Semaphore(_AT_ONCE)

    async def poll() -> bytes:
        async with dialling:
            reader, writer = await asyncio.open_connection("127.0.0.1", own.port)
        answer = b"408"
        is_counted = False
        while b"408" in answer:
            writer.write(request(run, operation_id))
            if not is_counted:
                opened.release()
                is_counted = True
            head = await reader.readuntil(b"\r\n\r\n")
            answer, _, fields = head.partition(b"\r\n")
            length = next(f for f in fields.lower().split(b"\r\n") if f.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
        writer.close()
        return answer

    tasks = [asyncio.create_task(poll()) for _ in range(NUM_POLLS)]
    for _ in tasks:
        await opened.acquire()
    await asyncio.to_thread(meanwhile)
    return await asyncio.gather(*tasks)


def test_every_open_poll_hears_of_its_operations_end(new_gateway: Callable[[], Gateway]):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    own = new_gateway()
    run = Run.create(own.http()).attached()
    operation_id = waiting_operation(run)
    missing = run.seq - 1

    def meanwhile() -> None:
        until(lambda: _num_connections(own) >= NUM_POLLS, "all are open")
        assert ok(run.http.get("/v1/teams"))
        ok(run.post("forward", seq=missing, data=[datum(words(1))], loss_fn="cross_entropy"), 202)

    answers = asyncio.run(polls_answered(own, run, operation_id, meanwhile))
    assert answers == [b"HTTP/1.1 200 OK"] * NUM_POLLS


def test_more_connections_than_files_harm_nobody(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    run = Run.create(own.http()).attached()
    operation_id = waiting_operation(run)
    missing = run.seq - 1
    process = psutil.Process(own.pid)
    spare = 60
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + spare,) * 2)

    async def crowd() -> None:
        async def knock() -> asyncio.StreamWriter | None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", own.port)
            except OSError:
                return None
            writer.write(request(run, operation_id))
            return writer

        writers = await asyncio.gather(*(knock() for _ in range(4 * spare)))
        await asyncio.sleep(1)
        # Whoever was connected before is served; whoever comes now may have to wait.
        assert (await asyncio.to_thread(run.http.get, "/v1/teams")).status_code == 200
        for writer in writers:
            if writer is not None:
                writer.close()

    asyncio.run(crowd())

    def is_served() -> bool:
        try:
            return httpx.get(f"{own.url}/healthz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    until(is_served, "others are served again")
    assert not is_gone(own.pid)
    ok(run.post("forward", seq=missing, data=[datum(words(1))], loss_fn="cross_entropy"), 202)
    run.result(operation_id)


def _num_connections(own: Gateway) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(own.pid).net_connections("tcp"))
