"""A training script of an official client while worker and server are killed; and the same script left in peace.

    python -m bench.chaos [MODEL_DIR] [--client loops|tinker] [--steps 200] [--kills 100] [--seed 0] [--json FILE]

The script (bench/clients/chaos_*.py) accumulates over two calls a step, saves and samples. A seeded plan says after
which of its outcomes, and how long after, ``kill -9`` strikes the worker or the server (which is started again on its
port). Some strikes come in pairs: the worker, then the server that is bringing it back. Both scripts' outcomes are
compared line by line, the operations in the database with those that the script made, and the checkpoints byte by byte.
Recovery is counted from the strike to the next outcome: as the server stored it, and as the script saw it, with
the pauses that the client itself makes. Needs ``.venv-client`` or ``.venv-tinker`` (``make setup``). Ends with 1 when
anything was lost, repeated or different.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.harness.server import Server, add_model

BENCH = Path(__file__).parent
MODEL = "chaos/model"
# An outcome this soon after a strike was on its way before it.
_UNDER_WAY_S = 0.25
_PAIR_SHARE = 0.15
_PROGRESS_EVERY = 50
_OUTCOMES_OF_A_DELAY = 3

Target = Literal["worker", "server"]


class Strike(NamedTuple):
    """Hit ``target``, ``delay_s`` after the script's outcome number ``after``."""

    after: int
    delay_s: float
    target: Target


@dataclass
class Played:
    """One run of the script.

    Args:
        outcomes: what it printed, in order.
        seen_at: when each came, wall clock.
        operations: kind and state of every operation in the database.
        finished_at: when each was stored, wall clock.
        files: digest of each file of each checkpoint, by the checkpoint's name.
        struck_at: when each strike hit, and what.
    """

    outcomes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    seen_at: list[float] = field(default_factory=list[float])
    operations: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    finished_at: list[float] = field(default_factory=list[float])
    files: dict[str, str] = field(default_factory=dict[str, str])
    struck_at: list[tuple[float, Target]] = field(default_factory=list[tuple[float, Target]])
    seconds: float = 0.0


@dataclass
class Verdict:
    """What the disturbed run shows beside the other; times in seconds."""

    client: str
    strikes: int
    worker_strikes: int
    server_strikes: int
    operations: int
    lost: int
    repeated: int
    different_outcomes: int
    different_files: int
    num_files: int
    recovery_stored_s: list[float]
    recovery_seen_s: list[float]
    undisturbed_s: float
    disturbed_s: float

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.repeated or self.different_outcomes or self.different_files)

    def render(self) -> str:
        return "\n".join(
            [
                f"client {self.client}: {self.strikes} strikes ({self.worker_strikes} worker, {self.server_strikes} "
                f"server) over {self.operations} operations",
                f"  lost {self.lost}, repeated {self.repeated}, outcomes that differ {self.different_outcomes}",
                f"  checkpoint files that differ {self.different_files} of {self.num_files}",
                f"  recovery, as stored:  {_spread(self.recovery_stored_s)}",
                f"  recovery, as seen:    {_spread(self.recovery_seen_s)}",
                f"  undisturbed {self.undisturbed_s:.0f} s, disturbed {self.disturbed_s:.0f} s",
            ]
        )


def _spread(values: list[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    return f"median {statistics.median(ordered):.2f} s ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def plan_strikes(seed: int, num: int, num_outcomes: int, outcome_s: float) -> list[Strike]:
    """``num`` strikes; each but the second of a pair waits for an outcome after the one before it.

    Args:
        num_outcomes: how many the script has.
        outcome_s: seconds from one to the next, left in peace.
    """
    rng = random.Random(seed)
    pairs = min(int(num * _PAIR_SHARE), num // 2)
    # Not in the last quarter, so that the script has not ended before the strike.
    points = sorted(rng.sample(range(1, max(num_outcomes * 3 // 4, num + 1)), num - pairs))
    paired = set(rng.sample(points, pairs))
    strikes: list[Strike] = []
    for point in points:
        target: Target = "worker" if point in paired or rng.random() < 0.5 else "server"
        strikes.append(Strike(point, rng.uniform(0.0, 2 * outcome_s), target))
        if point in paired:
            strikes.append(Strike(point, rng.uniform(0.2, 2.0), "server"))
    return strikes


class Killer(threading.Thread):
    """Carries out the strikes while the script goes on."""

    def __init__(self, server: Server, strikes: list[Strike], played: Played, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._strikes = strikes
        self._played = played
        self._over = over
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            for strike in self._strikes:
                self._await(strike.after, None)
                # On a machine that has become faster, the delay may be longer than all that is left.
                self._await(strike.after + _OUTCOMES_OF_A_DELAY, strike.delay_s)
                if self._over.is_set():
                    return
                self._strike(strike.target)
        except Exception as error:  # Reported by the main thread.
            self.failure = error

    def _await(self, num_outcomes: int, patience_s: float | None) -> None:
        """Return once the script has so many outcomes, or is over, or ``patience_s`` have passed."""
        deadline = float("inf") if patience_s is None else time.monotonic() + patience_s
        while len(self._played.outcomes) < num_outcomes and time.monotonic() < deadline:
            if self._over.wait(0.005):
                return

    def _strike(self, target: Target) -> None:
        at = time.time()
        if target == "worker":
            if not self._server.kill_worker():
                return
        else:
            self._server.kill()
            self._server.start()
        self._played.struck_at.append((at, target))


def play(server: Server, client: str, script: list[str], strikes: list[Strike]) -> Played:
    """Run the script to its end on a server of its own; raises RuntimeError when the script fails."""
    played, over = Played(), threading.Event()
    server.start()
    killer = Killer(server, strikes, played, over)
    try:
        killer.start()
        started = time.monotonic()
        environment = {**os.environ, **_environment(client, server)}
        with (
            tempfile.TemporaryFile("w+") as complaints,
            subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                played.seen_at.append(time.time())
                played.outcomes.append(json.loads(line))
                if len(played.outcomes) % _PROGRESS_EVERY == 0:
                    print(f"  {len(played.outcomes)} outcomes, {len(played.struck_at)} strikes", flush=True)
            code = child.wait()
            played.seconds = time.monotonic() - started
            over.set()
            killer.join()
            if code != 0:
                complaints.seek(0)
                raise RuntimeError(
                    f"the script ended with {code}:\n{complaints.read()[-4000:]}\n{server.log_path.read_text()[-4000:]}"
                )
        if killer.failure is not None:
            raise killer.failure
        _look_at(server, played)
    finally:
        over.set()
        server.stop()
    return played


def _environment(client: str, server: Server) -> dict[str, str]:
    common = {"NO_PROXY": "127.0.0.1"}
    if client == "tinker":
        return common | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": f"tml-{server.key}"}
    return common | {"LOOPS_BASE_URL": server.url, "BASETEN_API_KEY": server.key}


def _look_at(server: Server, played: Played) -> None:
    with sqlite3.connect(f"file:{server.data_dir / 'selfloop.db'}?mode=ro", uri=True) as database:
        for kind, state, finished_at in database.execute("SELECT kind, state, finished_at FROM operations"):
            played.operations[kind, state] += 1
            if finished_at is not None:
                played.finished_at.append(finished_at)
    for checkpoint in server.get("/v1/loops/checkpoints?scope=org&base_model=chaos%2Fmodel")["checkpoints"]:
        listed = server.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files")["presigned_urls"]
        for file in listed:
            with urllib.request.urlopen(file["url"], timeout=60) as answer:
                name = f"{checkpoint['target']}/{checkpoint['checkpoint_id']}/{file['relative_file_name']}"
                played.files[name] = hashlib.sha256(answer.read()).hexdigest()


def judge(client: str, peace: Played, war: Played) -> Verdict:
    made, found = peace.operations, war.operations
    done = {kind: num for (kind, state), num in found.items() if state == "done"}
    wanted = Counter[str]()
    for (kind, _), num in made.items():
        wanted[kind] += num
    total = Counter[str]()
    for (kind, _), num in found.items():
        total[kind] += num
    differ = sum(a != b for a, b in zip(peace.outcomes, war.outcomes, strict=False))
    names = peace.files.keys() | war.files.keys()
    return Verdict(
        client,
        strikes=len(war.struck_at),
        worker_strikes=sum(target == "worker" for _, target in war.struck_at),
        server_strikes=sum(target == "server" for _, target in war.struck_at),
        operations=sum(wanted.values()),
        lost=sum(max(num - done.get(kind, 0), 0) for kind, num in wanted.items()),
        repeated=sum(max(num - wanted[kind], 0) for kind, num in total.items()),
        different_outcomes=differ + abs(len(peace.outcomes) - len(war.outcomes)),
        different_files=sum(peace.files.get(name) != war.files.get(name) for name in names),
        num_files=len(names),
        recovery_stored_s=_recoveries(war.struck_at, war.finished_at),
        recovery_seen_s=_recoveries(war.struck_at, war.seen_at),
        undisturbed_s=peace.seconds,
        disturbed_s=war.seconds,
    )


def _recoveries(struck_at: list[tuple[float, Target]], outcomes_at: list[float]) -> list[float]:
    """Seconds from each strike that was followed by an outcome before the next strike, to that outcome."""
    found: list[float] = []
    for place, (at, _) in enumerate(struck_at):
        end = struck_at[place + 1][0] if place + 1 < len(struck_at) else float("inf")
        after = [o for o in outcomes_at if at + _UNDER_WAY_S <= o < end]
        if after:
            found.append(min(after) - at)
    return found


def python_of(client: str) -> str:
    """The Python that has the client's SDK."""
    variable = {"loops": "SELFLOOP_CLIENT_PYTHON", "tinker": "SELFLOOP_TINKER_PYTHON"}[client]
    folder = {"loops": ".venv-client", "tinker": ".venv-tinker"}[client]
    python = os.environ.get(variable) or str(BENCH.parent / folder / "bin" / "python")
    if not Path(python).exists():
        sys.exit(f"no Python with the {client} client: run `make setup`, or name one in {variable}")
    return python


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--client", choices=("loops", "tinker"), default="loops")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=32, help="tokens of an example; a call has two")
    parser.add_argument("--dtype", default="auto", help="of the server")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(arguments)
    if args.model_dir is None:
        from bench.harness.program import embedded_model

        args.model_dir = embedded_model()
    vocab_size = json.loads((args.model_dir / "config.json").read_text())["vocab_size"]
    name = BENCH / "clients" / f"chaos_{args.client}.py"
    script = [python_of(args.client), str(name), MODEL, str(args.steps), str(vocab_size), str(args.length)]
    with tempfile.TemporaryDirectory(prefix="selfloop-chaos-") as folder:
        template = Path(folder) / "template"
        add_model(template, args.model_dir, MODEL)
        servers: list[Server] = []
        for what in ("peace", "war"):
            data_dir = Path(shutil.copytree(template, Path(folder) / what))
            servers.append(Server(data_dir, "--dtype", args.dtype))
        print("Left in peace ...", flush=True)
        peace = play(servers[0], args.client, script, [])
        per_outcome_s = (peace.seen_at[-1] - peace.seen_at[0]) / len(peace.outcomes)
        strikes = plan_strikes(args.seed, args.kills, len(peace.outcomes), per_outcome_s)
        print(f"With {len(strikes)} strikes (seed {args.seed}) ...", flush=True)
        war = play(servers[1], args.client, script, strikes)
    verdict = judge(args.client, peace, war)
    print(verdict.render())
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(verdict), indent=1))
    return 0 if verdict.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
