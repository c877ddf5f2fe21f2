"""A server that has grown old: its start, its memory, and what a list costs everybody else.

    python -m bench.aged [--runs 10000 --checkpoints 50000 --operations 200000] [--database-url URL] [--json FILE]

A gateway starts on an empty data directory, and on one with that much history (``bench/harness/aged_rows.py``). Then
each list is asked as clients ask it, whole, while another client asks for one session, again and again. The longest
turn of the event loop is also measured by its thread's CPU time, which other programs on the machine do not change. It
takes no model and no worker.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

from sqlalchemy.engine import URL

from bench.harness.aged_rows import Owner, Sizes, fill, id_of, make_folders, write_log
from bench.harness.measure import percentile
from bench.harness.peer import PEERS
from bench.harness.report import Report, machine
from bench.harness.server import Server
from selfloop.control.gateway import database_url
from selfloop.control.resources.catalogue import EMBEDDED_MODEL as MODEL

LONGEST_HOLD_MS, START_ABOVE_S, BESIDE_P99_MS = 50.0, 2.0, 100.0
_SMALL = Sizes(runs=200, checkpoints=1000, operations=2000, samples=200, usage=600, log_lines=500, deployed=5, live=5)


def lists(sizes: Sizes) -> dict[str, str]:
    """Path by name of everything that grows with history, asked as the clients do."""
    run, model, deployment = id_of("r", sizes.runs // 2), id_of("k", 0), id_of("d", sizes.runs - 1)
    return {
        "runs": "/v1/loops/runs?scope=org",
        "samplers": "/v1/loops/samplers?scope=org",
        "deployments": "/v1/loops/deployments?scope=org",
        "checkpoints of a model": f"/v1/loops/checkpoints?base_model={MODEL.replace('/', '%2F')}",
        "checkpoints of a run": f"/v1/loops/checkpoints?run_id={run}",
        "deployed models": "/v1/models",
        "deployments of a model": f"/v1/models/{model}/deployments",
        "usage by run": "/v1/loops/usage?scope=org",
        "usage by key": "/v1/loops/usage?scope=org&group_by=key",
        "logs of a deployment": f"/v1/loops/deployments/{deployment}/logs",
        "tinker runs": "/api/v1/training_runs?limit=1000",
        "tinker checkpoints": "/api/v1/checkpoints?limit=1000",
        "tinker sessions": "/api/v1/sessions?limit=1000",
        "storage by project": "/api/v1/billing/usage/checkpoints/current",
        "models to sample": "/oai/api/v1/models",
        "metrics": "/metrics",
    }


def holds(server: Server) -> dict[str, float]:
    """The longest turns since the last call."""
    file = server.data_dir / "holds"
    file.unlink(missing_ok=True)
    os.kill(server.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while not file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the gateway does not say how long its turns were")
        time.sleep(0.01)
    return json.loads(file.read_text())


def ask(server: Server, path: str) -> int:
    """How many bytes a route answers, read as they come."""
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {server.key}"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        size = 0
        while chunk := answer.read(1 << 16):
            size += len(chunk)
        return size


def beside(server: Server, path: str, stop: threading.Event, times_ms: list[float]) -> None:
    while not stop.is_set():
        started = time.perf_counter()
        ask(server, path)
        times_ms.append(1e3 * (time.perf_counter() - started))


def measure_list(report: Report, server: Server, name: str, path: str, session: str, rounds: int) -> None:
    times_ms: list[float] = []
    stop = threading.Event()
    other = threading.Thread(target=beside, args=(server, f"/v1/loops/sessions/{session}", stop, times_ms))
    holds(server)
    other.start()
    try:
        seconds: list[float] = []
        for _ in range(rounds):
            started = time.perf_counter()
            size = ask(server, path)
            seconds.append(time.perf_counter() - started)
    finally:
        stop.set()
        other.join()
    longest = holds(server)
    report.add(name, "longest turn, CPU", "ms", longest["cpu_ms"], at_most=LONGEST_HOLD_MS)
    report.add(name, "longest turn", "ms", longest["wall_ms"])
    report.add(name, "a call beside it, p99", "ms", percentile(times_ms, 0.99), at_most=BESIDE_P99_MS)
    report.add(name, "answered in", "s", seconds)
    report.add(name, "size", "MB", size / 1e6)


def started(folder: Path, options: list[str]) -> Server:
    server = Server(folder, *options, program=[str(PEERS / "watched_gateway.py")])
    server.start()
    return server


def owner_of(server: Server) -> Owner:
    team = server.get("/v1/teams")["teams"][0]["id"]
    return Owner(team, server.get("/v1/users/me")["user_id"], MODEL)


def measure(report: Report, folder: Path, sizes: Sizes, options: list[str], url: URL, rounds: int) -> None:
    server = started(folder, options)
    empty_s, empty_rss = server.start_s, server.process.memory_info().rss
    owner = owner_of(server)
    server.stop()
    began = time.perf_counter()
    fill(url, owner, sizes)
    make_folders(folder, sizes)
    write_log(folder, owner, sizes)
    report.note(f"the history was made in {time.perf_counter() - began:.1f} s")
    key = server.key
    server = Server(folder, *options, program=[str(PEERS / "watched_gateway.py")])
    server.key = key
    server.start()
    try:
        cpu = server.process.cpu_times()
        report.add("start", "empty", "s", empty_s)
        report.add("start", "aged", "s", server.start_s)
        report.add("start", "aged, above an empty one", "s", server.start_s - empty_s, at_most=START_ABOVE_S)
        report.add("start", "aged, CPU", "s", cpu.user + cpu.system)
        report.add("memory", "empty", "MB", empty_rss / 1e6)
        report.add("memory", "aged, at the start", "MB", server.process.memory_info().rss / 1e6)
        holds(server)
        # What the start leaves to be tidied up later is tidied up within this time.
        time.sleep(5 if report.judged else 0)
        report.add("after the start", "longest turn, CPU", "ms", holds(server)["cpu_ms"], at_most=LONGEST_HOLD_MS)
        for name, path in lists(sizes).items():
            measure_list(report, server, name, path, id_of("s", 0), rounds)
        report.add("memory", "aged, after all lists", "MB", server.process.memory_info().rss / 1e6)
    finally:
        server.stop()


def main(argv: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Sizes()
    for name in ("runs", "checkpoints", "operations"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    parser.add_argument("--database-url", help="an empty PostgreSQL database, instead of a file")
    parser.add_argument("--rounds", type=int, default=2, help="how often each list is asked")
    parser.add_argument("--quick", action="store_true", help="little history, and no judgement")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(argv)
    sizes = replace(usual, runs=args.runs, checkpoints=args.checkpoints, operations=args.operations)
    sizes = _SMALL if args.quick else sizes
    report = Report("bench.aged", {**machine(), "runs": sizes.runs, "checkpoints": sizes.checkpoints})
    report.about["operations"] = sizes.operations
    report.judged = not args.quick
    options = ["--database-url", args.database_url] if args.database_url else []
    with tempfile.TemporaryDirectory(prefix="selfloop-bench-") as name:
        folder = Path(name)
        measure(report, folder, sizes, options, database_url(folder, args.database_url), args.rounds)
    print(report.render())
    if args.json:
        report.write(args.json)
    return report


if __name__ == "__main__":
    sys.exit(0 if all(figure.met is not False for figure in main().figures) else 1)
