"""The gateway under many waiting clients, on a tiny model.

    python -m bench.api_load [--cases samples waiting] [--waiting 2000 8000 32000] [--seconds 15] [--json FILE]

``waiting``: so many long polls on operations that do not finish, each asked anew as soon as it is sent home (after 20
to 30 s). Meanwhile, for ``--seconds`` each: nothing else; heartbeats of a session, one at a time; the same while
``--rate`` operations a second are posted; operations posted over 64 connections as fast as they are taken.

``samples``: ``--samples`` concurrent ``sample()`` calls of the official client, while ``--polls`` long polls wait for
operations that finish one after the other.

Load generator, gateway and worker share the machine: CPU times say what the gateway costs, the rates what the machine
had left for it. Runs from a clone, with the development requirements; samples need ``.venv-client`` (``make setup``).
"""

import argparse
import asyncio
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from bench.harness.load import Connection, Polls, WaitingRuns
from bench.harness.measure import percentile, scaled
from bench.harness.peer import PEERS, loops_client
from bench.harness.report import Report, machine
from bench.harness.server import Server, add_model, serving

MODEL = "tiny/load"
NUM_RUNS = 50
OPERATIONS_HELD = 400
LONGEST_HOLD_S = 30
# Open files besides the polls: posters, the database, journalled payloads.
SPARE_FILES = 500
# An open server that was measured the same way reports these beside 2,000 polls.
HEARTBEAT_MS, HEARTBEAT_P99_MS = 2.0, 7.0


@contextmanager
def gateway() -> Generator[tuple[Server, Path]]:
    """A gateway whose operations wait for long, with a tiny model in its catalogue; and its data directory."""
    with tempfile.TemporaryDirectory(prefix="selfloop-bench-") as name:
        folder = Path(name)
        made = "import sys; from pathlib import Path; import served_model; served_model.save(Path(sys.argv[1]))"
        tests = str(Path(__file__).parents[1] / "tests")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-c", made, str(folder / "model")]
        subprocess.run(command, env=env, check=True, capture_output=True)
        add_model(folder / "data", folder / "model", MODEL)
        with serving(folder / "data", program=[str(PEERS / "patient_gateway.py")]) as server:
            yield server, folder / "data"


async def ready_at(server: Server, data_dir: Path) -> dict[str, float]:
    """When each operation had its result."""
    times = data_dir / "times"
    server.process.send_signal(signal.SIGUSR1)
    while not times.exists():  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.05)
    return {id: float(at) for id, at in (line.split() for line in times.read_text().splitlines())}


async def samples(args: argparse.Namespace, report: Report) -> None:
    case = f"{args.samples} sample() calls at once, {args.polls} polls"
    with gateway() as (server, data_dir):
        client = loops_client(server, MODEL)
        try:
            prompt = list(range(3, 19))
            await asyncio.to_thread(client.ask, "sample", prompts=[prompt], max_tokens=1, seconds=0)
            runs, polls = WaitingRuns(server, MODEL), Polls(server)
            await runs.create(20)
            await runs.post_many(args.polls, 3600)
            polls.start(runs.operations, len(runs.operations))
            await asyncio.sleep(min(2.0, args.seconds))
            client.send("sample", prompts=[prompt] * args.samples, max_tokens=32, seconds=0)
            await runs.start()
            answered = await asyncio.gather(*polls.tasks)
            sampled = await asyncio.to_thread(client.answer)
        finally:
            client.close()
        ready = await ready_at(server, data_dir)
    spread(report, case, "result ready to poll answered", [(p.at - ready[p.operation_id]) * 1e3 for p in answered])
    spread(report, case, "sample() through the client", scaled(sampled["took"], 1e3))


def spread(
    report: Report,
    case: str,
    what: str,
    took_ms: Sequence[float],
    median: float | None = None,
    p99: float | None = None,
) -> None:
    report.add(case, f"{what}: median", "ms", percentile(took_ms, 0.5), at_most=median)
    report.add(case, f"{what}: p99", "ms", percentile(took_ms, 0.99), at_most=p99)
    report.add(case, f"{what}: worst", "ms", max(took_ms))


async def waiting(args: argparse.Namespace, report: Report) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_FILES
    for wanted in args.waiting:
        num = min(wanted, most)
        if num < wanted:
            report.note(
                f"{wanted:,} waiting polls take as many open files of the gateway, which may have "
                f"{most + SPARE_FILES:,} here (ulimit -Hn): {num:,} instead."
            )
        await wait_for(num, args, report)


async def wait_for(num: int, args: argparse.Namespace, report: Report) -> None:
    with gateway() as (server, _):
        runs, polls = WaitingRuns(server, MODEL), Polls(server)
        await runs.create(min(NUM_RUNS, num))
        await runs.post_many(min(OPERATIONS_HELD, num), 3600)
        polls.start(list(runs.operations), num)
        # Each has been renewed by then, at a time of its own.
        await asyncio.sleep((LONGEST_HOLD_S + num / 1000) if not args.quick else 1)
        idle = Phase(server, polls)
        await asyncio.sleep(args.seconds)
        idle.end()
        resting = await beat(server, runs.session_id, args.seconds)
        posting = asyncio.create_task(runs.post_many(None, args.seconds, args.rate))
        busy = await beat(server, runs.session_id, args.seconds)
        paced = await posting
        full, before = Phase(server, polls), len(runs.operations)
        rate = await runs.post_many(None, args.seconds)
        full.end()
        resident = server.process.memory_info().rss
        await polls.close()
    case, add = f"{num:,} waiting polls", report.add
    judged = num >= 2000
    spread(report, case, "heartbeat", resting, *((HEARTBEAT_MS, HEARTBEAT_P99_MS) if judged else ()))
    spread(report, case, f"heartbeat beside {paced:.0f} operations a second", busy)
    add(case, "polls renewed", "a second", idle.num_renewed / idle.seconds)
    add(case, "operations accepted, as many as it takes", "a second", rate)
    if idle.num_renewed > 0:
        renewal_s = idle.cpu_s / idle.num_renewed
        accept_s = (full.cpu_s - full.num_renewed * renewal_s) / (len(runs.operations) - before)
        add(case, "gateway's CPU for one renewed poll", "ms", renewal_s * 1e3)
        add(case, "gateway's CPU for one operation", "ms", accept_s * 1e3)
    add(case, "gateway's CPU meanwhile, of one core", "%", 100 * full.cpu_s / full.seconds)
    add(case, "generator's CPU meanwhile, of one core", "%", 100 * full.own_cpu_s / full.seconds)
    add(case, "gateway resident", "MiB", resident / 2**20)


class Phase:
    """What happened from its making to its end."""

    def __init__(self, server: Server, polls: Polls) -> None:
        self._server, self._polls = server, polls
        self.cpu_s, self.own_cpu_s, self.num_renewed, self.seconds = self._now()

    def end(self) -> None:
        cpu_s, own_cpu_s, num_renewed, seconds = self._now()
        self.cpu_s, self.own_cpu_s = cpu_s - self.cpu_s, own_cpu_s - self.own_cpu_s
        self.num_renewed, self.seconds = num_renewed - self.num_renewed, seconds - self.seconds

    def _now(self) -> tuple[float, float, int, float]:
        times = self._server.process.cpu_times()
        return times.user + times.system, time.process_time(), self._polls.renewals.num, time.monotonic()


async def beat(server: Server, session_id: str, seconds: float) -> list[float]:
    """Milliseconds of heartbeats, one at a time, 20 ms apart."""
    ends, took = time.monotonic() + seconds, list[float]()
    async with await Connection.dial(server) as connection:
        while time.monotonic() < ends:
            started = time.monotonic()
            await connection.json("POST", "/api/v1/session_heartbeat", {"session_id": session_id})
            took.append((time.monotonic() - started) * 1e3)
            await asyncio.sleep(0.02)
    return took


CASES: dict[str, Callable[[argparse.Namespace, Report], Coroutine[Any, Any, None]]] = {
    "samples": samples,
    "waiting": waiting,
}


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--polls", type=int, default=1000)
    parser.add_argument("--waiting", type=int, nargs="+", default=[2000, 8000, 32000])
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--quick", action="store_true", help="without verdicts and without waiting for renewals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(arguments)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report("api_load", machine(), judged=not args.quick)
    given = sys.argv[1:] if arguments is None else arguments
    report.about["command"] = shlex.join(["python", "-m", "bench.api_load", *given])
    for name in args.cases:
        uvloop.run(CASES[name](args, report))
    if args.json is not None:
        report.write(args.json)
    print(report.render())
    return report


if __name__ == "__main__":
    main()
