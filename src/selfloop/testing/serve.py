"""The process of a server that is made for tests: adds its model, serves, and says so on a line of standard output.

    python -m selfloop.testing.serve DATA_DIR PORT MODEL_DIR NAME

The key is in ``SELFLOOP_API_KEY``. It ends with SIGTERM, and when the process that started it is gone.
"""

import asyncio
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from selfloop.control.gateway import DataDirectory
from selfloop.server.serve import serve
from selfloop.testing.server import READY
from selfloop.types.settings import ControlSettings, EngineSettings, Settings, WorkerSettings


def _settings(data_dir: Path, port: int) -> Settings:
    engine = EngineSettings(device="cpu", dtype="float32", deterministic=True, num_threads=1)
    worker = WorkerSettings(launcher="selfloop.testing.faults:Launcher", keep_loaded_s=0, engine=engine)
    control = replace(ControlSettings(prepare=False, worker=worker), stop_grace_s=5.0)
    key = os.environ["SELFLOOP_API_KEY"]
    return Settings(port=port, data_dir=data_dir, api_key=key, hub_url=None, control=control)


async def _add(data_dir: Path, model: Path, name: str) -> None:
    data = DataDirectory(data_dir)
    try:
        await data.seed()
        await data.catalogue.add(str(model), name=name, revision=None, aliases=(), on_progress=_unseen)
    finally:
        await data.close()


def _unseen(stage: str, fraction: float) -> None:
    """Nobody watches the preparation of a model this small."""


def _end_with_parent() -> None:
    """The pipe closes when nobody holds its other end."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    data_dir, port, model, name = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_add(data_dir, model, name))
    serve(_settings(data_dir, port), lambda _: print(READY, flush=True))


if __name__ == "__main__":
    main()
