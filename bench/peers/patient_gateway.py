"""The gateway of bench/api_load.py: as ``selfloop serve``, and it notes when each operation had its result.

    python bench/peers/patient_gateway.py --port PORT --data-dir DIR

Operations wait an hour for a missing ``seq_id``, so that they can be held back for a whole measurement. On SIGUSR1 it
writes a line per operation to DIR/times: its id and the moment (``time.monotonic()``, one clock for the whole machine).
"""

import argparse
import os
import signal
import time
from pathlib import Path

from selfloop.control.queue.outcomes import Outcome
from selfloop.control.queue.waiters import AwaitedOutcomes
from selfloop.server import serve
from selfloop.types.settings import ControlSettings, QueueSettings, Settings

ready_at: dict[str, float] = {}
complete = AwaitedOutcomes.complete


def noting(self: AwaitedOutcomes[object], key: tuple[str, str], outcome: object) -> None:
    if isinstance(outcome, Outcome):  # of an operation, not of a queued sample
        ready_at[key[1]] = time.monotonic()
    complete(self, key, outcome)


AwaitedOutcomes.complete = noting  # type: ignore[method-assign]

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--data-dir", type=Path, required=True)
options = parser.parse_args()


def write_times(_signal: int, _frame: object) -> None:
    times = options.data_dir / "times"
    aside = times.with_suffix(".part")
    aside.write_text("".join(f"{id} {at!r}\n" for id, at in ready_at.items()))
    aside.rename(times)


signal.signal(signal.SIGUSR1, write_times)
settings = Settings(
    "127.0.0.1",
    options.port,
    options.data_dir,
    os.environ["SELFLOOP_API_KEY"],
    control=ControlSettings(prepare=False, queue=QueueSettings(gap_grace_s=3600.0)),
)
serve.serve(settings, lambda _made: None)
