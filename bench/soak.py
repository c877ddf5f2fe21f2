"""A server under mixed load for long: does it keep its memory, its files and its manners?

    python -m bench.soak [MODEL_DIR] [--minutes 30] [--runs 50] [--polls 1000] [--streams 20] [--json FILE]

``--runs`` runs train, accumulate, save and replace checkpoints, each a step in ``--step-every`` seconds; ``--polls``
long polls wait for operations that wait for one that never comes, and are made anew when the server gives those up;
``--streams`` samples stream, one after the other; management is asked ten times a second, by a process of its own. What
is resident, and which files are open, is compared between the end of the first sixth (at most five minutes, in which
caches fill) and the end.
Ends with 1 on an error, on growth over 5% or on a 99th percentile of management calls over 100 ms.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from bench.harness.asking import asking
from bench.harness.load import Connection
from bench.harness.measure import percentile
from bench.harness.server import Server, add_model

MODEL = "soak/model"
MAX_GROWTH = 0.05
MAX_P99_MS = 100.0
_POLLS_A_RUN = 50
_LOOK_EVERY_S = 2.0
_LOOKS_KEPT_EVERY = 15
_ASK_EVERY_S = 0.1
_KEPT_NAMES = 3
_LENGTH = 24
MIB = 2**20

Json = dict[str, Any]


class Look(NamedTuple):
    """The processes at one moment."""

    at: float
    gateway_bytes: int
    worker_bytes: int
    gateway_files: int
    worker_files: int


@dataclass
class Seen:
    """What the load met."""

    looks: list[Look] = field(default_factory=list[Look])
    management_s: list[float] = field(default_factory=list[float])
    done: Counter[str] = field(default_factory=Counter[str])
    errors: Counter[str] = field(default_factory=Counter[str])


class Load:
    """Everything that is asked of the server. Each part goes on until it is cancelled."""

    def __init__(self, server: Server, vocab_size: int, seen: Seen, step_every_s: float) -> None:
        self._server = server
        self._vocab_size = vocab_size
        self._seen = seen
        self._step_every_s = step_every_s

    async def make_runs(self, num: int) -> list[Json]:
        """Runs of one session, each with its adapter made."""
        async with await Connection.dial(self._server) as connection:
            session = (await connection.json("POST", "/v1/loops/sessions", {}))["session"]["id"]
            runs: list[Json] = []
            for _ in range(num):
                body = {"session_id": session, "base_model": MODEL, "lora_rank": 8}
                run = (await connection.json("POST", "/v1/loops/runs", body))["run"]
                first = {"model": MODEL, "run_id": run["id"], "seq_id": 1, "lora_rank": 8, "base_model": MODEL}
                id = await self._submit(connection, run["id"], "init_trainer_server", first)
                await self._outcome(connection, run["id"], id)
                runs.append(run)
        return runs

    async def publish(self, run: Json) -> None:
        """Give the run's sampler weights of its own, as loops of rollouts begin."""
        async with await Connection.dial(self._server) as connection:
            body = {"name": f"kept-{_KEPT_NAMES}", "seq_id": 2}
            outcome = await self._outcome(
                connection, run["id"], await self._submit(connection, run["id"], "save_weights_for_sampler", body)
            )
        self._count("publish", outcome["status"] == "done", outcome)

    async def train(self, run: Json, index: int) -> None:
        """Two accumulated calls a step; every few steps a save under one of a few names."""
        rng = random.Random(index)
        seqs = itertools.count(3)
        await asyncio.sleep(rng.uniform(0, self._step_every_s))
        for step in itertools.count():
            started = time.monotonic()
            calls = [("forward_backward", self._loss(rng)), ("forward_backward", self._loss(rng))]
            calls.append(("optim_step", {"adam_params": {"learning_rate": 1e-4}}))
            if step % 10 == index % 10:
                kind = "save_state" if step % 20 == index % 20 else "save_weights_for_sampler"
                calls.append((kind, {"name": f"kept-{step % _KEPT_NAMES}"}))
            async with await Connection.dial(self._server) as connection:
                ids = [
                    await self._submit(connection, run["id"], op, body | {"seq_id": next(seqs)}) for op, body in calls
                ]
                for (op, _), id in zip(calls, ids, strict=True):
                    outcome = await self._outcome(connection, run["id"], id)
                    self._count(op, outcome["status"] == "done", outcome)
            await asyncio.sleep(max(0.0, self._step_every_s - (time.monotonic() - started)))

    async def wait(self, run: Json) -> None:
        """Polls of operations behind a gap, which the server gives up after a minute; each has its own connection."""
        next_seq = 2
        while True:
            bodies = [self._loss(random.Random(i)) | {"seq_id": next_seq + 1 + i} for i in range(_POLLS_A_RUN)]
            async with await Connection.dial(self._server) as connection:
                ids = [await self._submit(connection, run["id"], "forward", body) for body in bodies]
            await asyncio.gather(*(self._poll(run["id"], id) for id in ids))
            next_seq += 1 + _POLLS_A_RUN

    async def _poll(self, run_id: str, id: str) -> None:
        async with await Connection.dial(self._server) as connection:
            outcome = await self._outcome(connection, run_id, id)
        # One that came when its gap had been given up already is carried out.
        good = outcome.get("error_class") == "MissingOperation" or outcome["status"] == "done"
        self._count("poll", good, outcome)

    async def stream(self, http: httpx.AsyncClient, run: Json, index: int) -> None:
        url = f"/loops/samplers/{run['sampler']['id']}/v1/completions"
        for seed in itertools.count(index):
            body = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 64, "seed": seed, "stream": True}
            whole = False
            async with http.stream("POST", url, json=body) as answer:
                async for line in answer.aiter_lines():
                    whole = whole or line == "data: [DONE]"
            self._count("stream", whole and answer.status_code == 200, answer.status_code)

    async def look(self) -> None:
        gateway = self._server.process
        while True:
            workers = self._server.workers()
            with contextlib.suppress(psutil.NoSuchProcess):
                worker_bytes = sum(worker.memory_info().rss for worker in workers)
                worker_files = sum(worker.num_fds() for worker in workers)
                now = time.monotonic()
                memory = gateway.memory_info().rss
                self._seen.looks.append(Look(now, memory, worker_bytes, gateway.num_fds(), worker_files))
            await asyncio.sleep(_LOOK_EVERY_S)

    def _loss(self, rng: random.Random) -> Json:
        tokens = [rng.randrange(3, self._vocab_size) for _ in range(_LENGTH + 1)]
        targets = {"data": tokens[1:], "dtype": "int64", "shape": [_LENGTH]}
        datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
            "loss_fn_inputs": {"target_tokens": targets},
        }
        return {"data": [datum], "loss_fn": "cross_entropy"}

    async def _submit(self, connection: Connection, run_id: str, op: str, body: Json) -> str:
        key = f"Idempotency-Key: {uuid.uuid4().hex}\r\n"
        answer = await connection.ask("POST", f"/loops/runs/{run_id}/{op}", body, key)
        assert answer.status == 202, answer
        return json.loads(answer.body)["operation_id"]

    async def _outcome(self, connection: Connection, run_id: str, id: str) -> Json:
        while (answer := await connection.ask("GET", f"/loops/runs/{run_id}/operations/{id}")).status == 408:
            pass
        assert answer.status == 200, answer
        return json.loads(answer.body)

    def _count(self, what: str, good: bool, answer: object) -> None:
        self._seen.done[what] += 1
        if not good:
            self._seen.errors[f"{what}: {answer}"[:200]] += 1


async def soak(server: Server, args: argparse.Namespace, vocab_size: int) -> Seen:
    seen = Seen()
    load = Load(server, vocab_size, seen, args.step_every)
    runs = await load.make_runs(args.runs)
    waiting = await load.make_runs(max(args.polls // _POLLS_A_RUN, 1))
    await asyncio.gather(*(load.publish(run) for run in runs))
    paths = [path for run in runs for path in _management(run["id"])]
    headers = {"Authorization": f"Bearer {server.key}"}
    with asking(server.url, server.key, paths, _ASK_EVERY_S) as asker:
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=180) as http:
            work: list[Coroutine[Any, Any, None]] = [load.look()]
            work += [load.train(run, index) for index, run in enumerate(runs)]
            work += [load.wait(run) for run in waiting]
            work += [load.stream(http, runs[index % len(runs)], index) for index in range(args.streams)]
            tasks = [asyncio.create_task(one) for one in work]
            ended, _ = await asyncio.wait(tasks, timeout=args.minutes * 60, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                seen.errors[f"a part of the load ended: {task.exception()!r}"[:300]] += 1
            asked = await asyncio.to_thread(asker.end)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    seen.management_s = asked.seconds
    seen.done["management"] = len(asked.seconds)
    seen.errors.update({f"management: {status}": num for status, num in asked.refused.items()})
    return seen


def _management(run_id: str) -> tuple[str, ...]:
    return f"/v1/loops/runs/{run_id}", f"/v1/loops/checkpoints?run_id={run_id}", "/v1/teams"


class Growth(NamedTuple):
    """Means of the windows after the warm-up and at the end."""

    before: float
    after: float

    @property
    def share(self) -> float:
        return self.after / self.before - 1 if self.before else 0.0


def growth(looks: list[Look], name: str) -> Growth:
    """Of one field, from the end of the warm-up to the end; each a mean over a tenth of the time."""
    start, end = looks[0].at, looks[-1].at
    warm = start + min(300.0, (end - start) / 6)
    window = (end - start) / 10
    early = [getattr(look, name) for look in looks if warm <= look.at <= warm + window]
    late = [getattr(look, name) for look in looks if look.at >= end - window]
    return Growth(statistics.mean(early), statistics.mean(late))


def report(seen: Seen, minutes: float) -> tuple[str, Json, bool]:
    p99_ms = percentile(seen.management_s, 0.99) * 1e3
    found = {name: growth(seen.looks, name) for name in Look._fields[1:]}
    lines = [f"{minutes:g} minutes: {dict(seen.done)}"]
    lines += [f"  error x{num}: {error}" for error, num in seen.errors.most_common(10)]
    for name, values in found.items():
        unit, label = (MIB, "MiB") if name.endswith("bytes") else (1, "")
        lines.append(f"  {name}: {values.before / unit:.1f} to {values.after / unit:.1f} {label} ({values.share:+.1%})")
    p50_ms = percentile(seen.management_s, 0.5) * 1e3
    lines.append(f"  management calls: median {p50_ms:.1f} ms, 99th percentile {p99_ms:.1f} ms")
    grown = [name for name, values in found.items() if values.share > MAX_GROWTH]
    good = not seen.errors and not grown and p99_ms <= MAX_P99_MS
    figures = {
        "minutes": minutes,
        "done": dict(seen.done),
        "errors": dict(seen.errors),
        "growth": {name: values.share for name, values in found.items()},
        "looks": [look._asdict() for look in seen.looks[::_LOOKS_KEPT_EVERY]],
        "management_p50_ms": p50_ms,
        "management_p99_ms": p99_ms,
    }
    return "\n".join(lines), figures, good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--polls", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--step-every", type=float, default=60.0, help="seconds from step to step of a run")
    parser.add_argument("--dtype", default="auto", help="of the server")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(arguments)
    if args.model_dir is None:
        from bench.harness.program import embedded_model

        args.model_dir = embedded_model()
    vocab_size = json.loads((args.model_dir / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="selfloop-soak-") as folder:
        data_dir = Path(folder) / "data"
        add_model(data_dir, args.model_dir.absolute(), MODEL)
        server = Server(data_dir, "--dtype", args.dtype)
        server.start()
        try:
            seen = asyncio.run(soak(server, args, vocab_size))
        finally:
            server.stop()
    text, figures, good = report(seen, args.minutes)
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
