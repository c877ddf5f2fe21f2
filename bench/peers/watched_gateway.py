"""The gateway of bench/aged.py: as ``selfloop serve``, and it notes how long each turn of its event loop took.

    python bench/peers/watched_gateway.py --port PORT --data-dir DIR

It runs on asyncio's own loop, whose turns can be watched. On SIGUSR1 it writes the longest since the last one to
DIR/holds, as JSON: ``cpu_ms``, what the loop's thread computed, which is our own work, and ``wall_ms``, which includes
the machine, too.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from pathlib import Path

import uvloop

from selfloop.server import serve
from selfloop.types.settings import ControlSettings, Settings

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--data-dir", type=Path, required=True)
parser.add_argument("--database-url")
options = parser.parse_args()

longest = {"cpu_ms": 0.0, "wall_ms": 0.0}
plain = asyncio.Handle._run  # type: ignore[attr-defined]


def watched(self: asyncio.Handle) -> None:
    cpu, wall = time.thread_time(), time.perf_counter()
    plain(self)
    longest["cpu_ms"] = max(longest["cpu_ms"], 1e3 * (time.thread_time() - cpu))
    longest["wall_ms"] = max(longest["wall_ms"], 1e3 * (time.perf_counter() - wall))


def write_holds(_signal: int, _frame: object) -> None:
    holds = options.data_dir / "holds"
    aside = holds.with_suffix(".part")
    aside.write_text(json.dumps(longest))
    aside.rename(holds)
    longest.update(dict.fromkeys(longest, 0.0))


asyncio.Handle._run = watched  # type: ignore[attr-defined]
uvloop.run = asyncio.run  # type: ignore[assignment]
signal.signal(signal.SIGUSR1, write_holds)
settings = Settings(
    "127.0.0.1",
    options.port,
    options.data_dir,
    os.environ["SELFLOOP_API_KEY"],
    control=ControlSettings(options.database_url, prepare=False),
)
serve.serve(settings, lambda _made: None)
