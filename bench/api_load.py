"""The gateway under many waiting clients, on a tiny model; prints a table.

    python bench/api_load.py [--rounds 3] [--samples 200] [--polls 1000] [--waiting 8000] [--rate 500] [--seconds 15]

First: ``--samples`` concurrent ``sample()`` calls of the official client, while ``--polls`` long polls wait for
operations that finish one after the other. Then: ``--waiting`` long polls on operations that do not finish, each asked
anew as soon as it is sent home (after 20 to 30 s), for four times ``--seconds``: nothing else; management calls, one at
a time; the same while ``--rate`` operations a second are posted; operations are posted over 64 connections as
fast as they are taken. Load generator, gateway and worker share the machine: CPU times say what the gateway costs, the
rates what the machine had left for it. Runs from a clone, with the development requirements; the samples need
``.venv-client`` (``make setup``).
"""

import argparse
import asyncio
import itertools
import json
import os
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop

from selfloop.cli.client_env import NO_PYTHON, find_client_python

BENCH = Path(__file__).parent
MODEL = "tiny/load"
NUM_RUNS = 50
NUM_POSTERS = 64
OPERATIONS_HELD = 400
LONGEST_HOLD_S = 30


class Answer(NamedTuple):
    status: int
    body: bytes
    at: float


class Connection:
    """One kept-alive connection that speaks as little HTTP as it takes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader = reader
        self._writer = writer
        self._key = key

    @classmethod
    async def open(cls, port: int, key: str) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port), key)

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

    def close(self) -> None:
        self._writer.close()


class Runs:
    """Runs whose first operation has not come, so that all that come wait."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self.ids: list[str] = []
        self._next_seq: dict[str, int] = {}
        self.operations: list[tuple[str, str]] = []

    async def create(self, num: int) -> None:
        connection = await Connection.open(self._port, self._key)
        session = (await connection.json("POST", "/v1/loops/sessions", {}))["session"]["id"]
        for _ in range(num):
            body = {"session_id": session, "base_model": MODEL, "lora_rank": 8}
            self.ids.append((await connection.json("POST", "/v1/loops/trainers", body))["run"]["id"])
        self._next_seq = dict.fromkeys(self.ids, 2)
        connection.close()

    async def post(self, connection: Connection, run_id: str) -> None:
        """Accept one more operation that waits."""
        seq = self._next_seq[run_id]
        self._next_seq[run_id] = seq + 1
        id = uuid.uuid4().hex
        body = {"model": MODEL, "run_id": run_id, "seq_id": seq, "adam_params": {"learning_rate": 1e-4}}
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
            connection = await Connection.open(self._port, self._key)
            turn = index
            for number in left:
                await asyncio.sleep(started + number / rate - time.monotonic())
                if time.monotonic() - started > seconds:
                    break
                await self.post(connection, self.ids[turn % len(self.ids)])
                turn += NUM_POSTERS
            connection.close()

        await asyncio.gather(*(poster(i) for i in range(NUM_POSTERS)))
        return (len(self.operations) - before) / (time.monotonic() - started)

    async def start(self) -> None:
        """Send the operation that all others wait for."""
        connection = await Connection.open(self._port, self._key)
        for run_id in self.ids:
            body = {"model": MODEL, "run_id": run_id, "seq_id": 1, "lora_rank": 8, "base_model": MODEL}
            answer = await connection.ask("POST", f"/loops/runs/{run_id}/init_trainer_server", body)
            assert answer.status == 202, answer
        connection.close()


class Poll(NamedTuple):
    operation_id: str
    at: float


@dataclass
class Renewals:
    """How many polls were sent home and came again."""

    num: int = 0


async def poll(port: int, key: str, operation: tuple[str, str], opened: asyncio.Semaphore, renewals: Renewals) -> Poll:
    """Ask for one operation until it has its outcome, as the client does."""
    run_id, id = operation
    async with opened:
        connection = await Connection.open(port, key)
    while True:
        answer = await connection.ask("GET", f"/loops/runs/{run_id}/operations/{id}")
        if answer.status != 408:
            connection.close()
            assert answer.status == 200, answer
            assert json.loads(answer.body)["status"] == "done", answer
            return Poll(id, answer.at)
        renewals.num += 1


class Gateway(NamedTuple):
    port: int
    key: str
    times: Path
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """CPU seconds the gateway has used."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    async def ready_at(self) -> dict[str, float]:
        """When each operation had its result."""
        self.process.send_signal(signal.SIGUSR1)
        while not self.times.exists():  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
        return {id: float(at) for id, at in (line.split() for line in self.times.read_text().splitlines())}


def _launch(command: list[str], env: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    with open(log_path, "ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


@asynccontextmanager
async def serving(data_dir: Path) -> AsyncGenerator[Gateway]:
    port, key, times = 20000 + secrets.randbelow(10000), secrets.token_urlsafe(16), data_dir / "times"
    command = [sys.executable, str(BENCH / "load_gateway.py"), str(port), str(data_dir), str(times)]
    process = _launch(command, {**os.environ, "SELFLOOP_API_KEY": key}, data_dir / "bench-server.log")
    try:
        for _ in range(200):
            await asyncio.sleep(0.1)
            try:
                connection = await Connection.open(port, key)
            except OSError:
                assert process.poll() is None, (data_dir / "bench-server.log").read_text()
                continue
            await connection.json("GET", "/healthz")
            connection.close()
            break
        yield Gateway(port, key, times, process)
    finally:
        process.terminate()
        process.wait()


async def many_samples(args: argparse.Namespace, data_dir: Path, client: str | None) -> dict[str, list[float]]:
    """Milliseconds from a result to the answer of its poll, while the official client samples."""
    async with serving(data_dir) as gateway:
        sampler: asyncio.subprocess.Process | None = None
        if client is not None:
            env = {**os.environ, "LOOPS_BASE_URL": f"http://127.0.0.1:{gateway.port}", "BASETEN_API_KEY": gateway.key}
            env.pop("PYTHONPATH", None)
            command = [client, str(BENCH / "load_samples.py"), MODEL]
            pipe = asyncio.subprocess.PIPE
            sampler = await asyncio.create_subprocess_exec(*command, env=env, stdin=pipe, stdout=pipe, limit=2**24)
            assert sampler.stdout is not None
            assert await sampler.stdout.readline() == b"{}\n", "the client came up"
        runs = Runs(gateway.port, gateway.key)
        await runs.create(20)
        await runs.post_many(args.polls, 3600)
        opened = asyncio.Semaphore(64)
        polls = [asyncio.create_task(poll(gateway.port, gateway.key, op, opened, Renewals())) for op in runs.operations]
        await asyncio.sleep(2)
        if sampler is not None:
            assert sampler.stdin is not None
            sampler.stdin.write(f"{args.samples}\n".encode())
        await runs.start()
        answered = await asyncio.gather(*polls)
        took: list[float] = []
        if sampler is not None:
            assert sampler.stdin is not None
            assert sampler.stdout is not None
            line = json.loads(await sampler.stdout.readline())
            assert not line["errors"], line["errors"][:3]
            took = line["took"]
            sampler.stdin.close()
            await sampler.wait()
        ready_at = await gateway.ready_at()
        return {
            "result ready to poll answered, ms": [(p.at - ready_at[p.operation_id]) * 1e3 for p in answered],
            "sample() through the client, s": took,
        }


async def many_waiting(args: argparse.Namespace, data_dir: Path) -> dict[str, list[float]]:
    async with serving(data_dir) as gateway:
        runs = Runs(gateway.port, gateway.key)
        await runs.create(NUM_RUNS)
        await runs.post_many(OPERATIONS_HELD, 3600)
        held = list(runs.operations)
        opened, renewals = asyncio.Semaphore(64), Renewals()
        polls = [
            asyncio.create_task(poll(gateway.port, gateway.key, held[i % len(held)], opened, renewals))
            for i in range(args.waiting)
        ]
        # Each has been renewed by then, at a time of its own.
        await asyncio.sleep(LONGEST_HOLD_S + args.waiting / 1000)
        idle = Phase(gateway, renewals)
        await asyncio.sleep(args.seconds)
        idle.end()
        resting = await manage(gateway, runs.ids, args.seconds)
        posting = asyncio.create_task(runs.post_many(None, args.seconds, args.rate))
        busy = await manage(gateway, runs.ids, args.seconds)
        paced = await posting
        full, before = Phase(gateway, renewals), len(runs.operations)
        rate = await runs.post_many(None, args.seconds)
        full.end()
        assert not any(p.done() for p in polls), [p for p in polls if p.done()][:1]
        for task in polls:
            task.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        renewal_s = idle.cpu_s / idle.num_renewed
        accept_s = (full.cpu_s - full.num_renewed * renewal_s) / (len(runs.operations) - before)
        return {
            "polls renewed a second": [idle.num_renewed / idle.seconds],
            "gateway's CPU for one of them, ms": [renewal_s * 1e3],
            "management call, polls renewed, ms": resting,
            "operations posted a second, paced": [paced],
            "management call meanwhile, ms": busy,
            "operations accepted a second, unpaced": [rate],
            "polls renewed a second meanwhile": [full.num_renewed / full.seconds],
            "gateway's CPU for one operation, ms": [accept_s * 1e3],
            "gateway's CPU, % of one core": [100 * full.cpu_s / full.seconds],
            "generator's CPU, % of one core": [100 * full.own_cpu_s / full.seconds],
        }


class Phase:
    """What happened from its making to its end."""

    def __init__(self, gateway: Gateway, renewals: Renewals) -> None:
        self._gateway, self._renewals = gateway, renewals
        self.cpu_s, self.own_cpu_s, self.num_renewed, self.seconds = self._now()

    def end(self) -> None:
        cpu_s, own_cpu_s, num_renewed, seconds = self._now()
        self.cpu_s, self.own_cpu_s = cpu_s - self.cpu_s, own_cpu_s - self.own_cpu_s
        self.num_renewed, self.seconds = num_renewed - self.num_renewed, seconds - self.seconds

    def _now(self) -> tuple[float, float, int, float]:
        return self._gateway.cpu_s(), time.process_time(), self._renewals.num, time.monotonic()


async def manage(gateway: Gateway, run_ids: Sequence[str], seconds: float) -> list[float]:
    """Management calls one at a time, 20 ms apart."""
    connection = await Connection.open(gateway.port, gateway.key)
    ends, took = time.monotonic() + seconds, list[float]()
    while time.monotonic() < ends:
        started = time.monotonic()
        await connection.json("GET", f"/v1/loops/runs/{run_ids[len(took) % len(run_ids)]}")
        took.append((time.monotonic() - started) * 1e3)
        await asyncio.sleep(0.02)
    connection.close()
    return took


def prepare(folder: Path) -> Path:
    """A data directory whose catalogue has a tiny model."""
    made = "import sys; from pathlib import Path; import served_model; served_model.save(Path(sys.argv[1]))"
    tests = str(BENCH.parent / "tests")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", made, str(folder / "model")], env=env, check=True, capture_output=True)
    add = ["models", "add", str(folder / "model"), "--name", MODEL, "--data-dir", str(folder / "data")]
    subprocess.run([sys.executable, "-m", "selfloop.cli.main", *add], check=True, capture_output=True)
    return folder / "data"


async def measure(args: argparse.Namespace) -> None:
    client = args.client or find_client_python()
    if client is None:
        print(NO_PYTHON, "(without it: no samples)", file=sys.stderr)
    for number in range(args.rounds):
        rows: dict[str, list[float]] = {}
        for part in args.parts:
            with tempfile.TemporaryDirectory(prefix="selfloop-bench-") as name:
                data_dir = prepare(Path(name))
                if part == "samples":
                    rows |= await many_samples(args, data_dir, client)
                else:
                    rows |= await many_waiting(args, data_dir)
        print(f"round {number}; load average {os.getloadavg()[0]:.1f}")
        print(f"{'':46}{'count':>6}{'median':>9}{'p99':>9}{'max':>9}")
        for what, values in rows.items():
            if values:
                p99 = sorted(values)[int(0.99 * (len(values) - 1))]
                print(f"{what:46}{len(values):6}{statistics.median(values):9.2f}{p99:9.2f}{max(values):9.2f}")
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--polls", type=int, default=1000)
    parser.add_argument("--waiting", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--client", help="a Python with the official client; default: .venv-client's")
    parser.add_argument("--parts", nargs="+", choices=["samples", "waiting"], default=["samples", "waiting"])
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(measure(args))


if __name__ == "__main__":
    main()
