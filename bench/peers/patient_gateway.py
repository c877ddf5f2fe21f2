"""The gateway of bench/api_load.py: as ``selfloop serve``, and it notes when each operation had its result.

    python bench/peers/patient_gateway.py --port PORT --data-dir DIR

Operations wait an hour for a missing ``seq_id``, so that they can be held back for a whole measurement. On SIGUSR1 it
writes a line per operation to DIR/times: its id and the moment (``time.monotonic()``, one clock for the whole machine).
"""

import argparse
import dataclasses
import os
import signal
import time
from pathlib import Path

from selfloop.control.gateway import ControlConfig
from selfloop.control.queue.operations import Operations
from selfloop.control.queue.outcomes import Outcome
from selfloop.control.queue.scheduler import SchedulerConfig
from selfloop.server import serve
from selfloop.server.settings import Settings
from selfloop.storage.db.tables import OperationRow

ready_at: dict[str, float] = {}
settled = Operations._completed
plain = Settings.control.fget


def noting(self: Operations, row: OperationRow, outcome: Outcome) -> None:
    ready_at[row.id] = time.monotonic()
    settled(self, row, outcome)


def patient(self: Settings) -> ControlConfig:
    return dataclasses.replace(plain(self), scheduler=SchedulerConfig(gap_grace_s=3600.0))


Operations._completed = noting  # type: ignore[method-assign]
Settings.control = property(patient)  # type: ignore[assignment, method-assign]

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
settings = Settings("127.0.0.1", options.port, options.data_dir, prepare=False)
serve.serve(settings, os.environ["SELFLOOP_API_KEY"], lambda _made: None)
