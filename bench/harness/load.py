"""Many waiting clients at little cost: just enough HTTP, in one event loop."""

import asyncio
import itertools
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from bench.harness.server import Server

NUM_POSTERS = 64
# A loopback address has about 28,000 ports to dial from; more connections than that need several.
_PORTS_PER_ADDRESS = 20_000


class Answer(NamedTuple):
    status: int
    body: bytes
    at: float


class Connection:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader = reader
        self._writer = writer
        self._key = key

    @classmethod
    async def dial(cls, server: Server, index: int = 0) -> "Connection":
        """The ``index`` of a connection among many picks the address it comes from."""
        source = f"127.0.0.{1 + index // _PORTS_PER_ADDRESS}"
        port = urlsplit(server.url).port
        return cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)), server.key)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def ask(self, method: str, path: str, body: object = None, headers: str = "") -> Answer:
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
        )
        self._writer.write(head.encode() + content)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        at = time.monotonic()
        lines = answer.decode("latin-1").lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        return Answer(int(lines[0].split()[1]), await self._reader.readexactly(length), at)

    async def json(self, method: str, path: str, body: object = None) -> Any:
        answer = await self.ask(method, path, body)
        assert answer.status < 300, (method, path, answer)
        return json.loads(answer.body)


class WaitingRuns:
    """Runs of one session whose first operation has not come, so that all that come wait."""

    def __init__(self, server: Server, model: str) -> None:
        self._server, self._model = server, model
        self.session_id = ""
        self.ids: list[str] = []
        self._next_seq: dict[str, int] = {}
        self.operations: list[tuple[str, str]] = []

    async def create(self, num: int) -> None:
        async with await Connection.dial(self._server) as connection:
            self.session_id = (await connection.json("POST", "/v1/loops/sessions", {}))["session"]["id"]
            for _ in range(num):
                body = {"session_id": self.session_id, "base_model": self._model, "lora_rank": 8}
                self.ids.append((await connection.json("POST", "/v1/loops/trainers", body))["run"]["id"])
        self._next_seq = dict.fromkeys(self.ids, 2)

    async def post(self, connection: Connection, run_id: str) -> None:
        """Accept one more operation that waits."""
        seq = self._next_seq[run_id]
        self._next_seq[run_id] = seq + 1
        id = uuid.uuid4().hex
        body = {"model": self._model, "run_id": run_id, "seq_id": seq, "adam_params": {"learning_rate": 1e-4}}
        answer = await connection.ask("POST", f"/loops/runs/{run_id}/optim_step", body, f"Idempotency-Key: {id}\r\n")
        assert answer.status == 202, answer
        self.operations.append((run_id, id))

    async def post_many(self, num: int | None, seconds: float, rate: float = float("inf")) -> float:
        """``num`` operations (or as many as ``seconds`` allow) over NUM_POSTERS connections; returns them a second.

        Args:
            rate: how many to send a second, evenly; those that are late are sent at once.
        """
        started, before = time.monotonic(), len(self.operations)
        left = iter(range(num)) if num is not None else itertools.count()

        async def poster(index: int) -> None:
            turn = index
            async with await Connection.dial(self._server) as connection:
                for number in left:
                    await asyncio.sleep(started + number / rate - time.monotonic())
                    if time.monotonic() - started > seconds:
                        break
                    await self.post(connection, self.ids[turn % len(self.ids)])
                    turn += NUM_POSTERS

        await asyncio.gather(*(poster(i) for i in range(NUM_POSTERS)))
        return (len(self.operations) - before) / (time.monotonic() - started)

    async def start(self) -> None:
        """Send the operation that all others wait for."""
        async with await Connection.dial(self._server) as connection:
            for run_id in self.ids:
                body = {"model": self._model, "run_id": run_id, "seq_id": 1, "lora_rank": 8, "base_model": self._model}
                answer = await connection.ask("POST", f"/loops/runs/{run_id}/init_trainer_server", body)
                assert answer.status == 202, answer


class Poll(NamedTuple):
    operation_id: str
    at: float


@dataclass
class Renewals:
    """How many polls were sent home and came again."""

    num: int = 0


class Polls:
    """Long polls that ask for operations until these have their outcomes, each over a connection of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._dialling = asyncio.Semaphore(64)
        self.renewals = Renewals()
        self.tasks: list[asyncio.Task[Poll]] = []

    def start(self, operations: list[tuple[str, str]], num: int) -> None:
        """``num`` of them, over these operations."""
        for index in range(num):
            self.tasks.append(asyncio.create_task(self._poll(index, *operations[index % len(operations)])))

    async def _poll(self, index: int, run_id: str, id: str) -> Poll:
        async with self._dialling:
            connection = await Connection.dial(self._server, index)
        async with connection:
            while (answer := await connection.ask("GET", f"/loops/runs/{run_id}/operations/{id}")).status == 408:
                self.renewals.num += 1
        assert answer.status == 200, answer
        assert json.loads(answer.body)["status"] == "done", answer
        return Poll(id, answer.at)

    async def close(self) -> None:
        """End them; none may have had an answer."""
        done = [task for task in self.tasks if task.done()]
        assert not done, done[:1]
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
