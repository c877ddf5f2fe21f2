"""What a test asks of the workers of its server."""

import os
import signal
from pathlib import Path


class Orders:
    """Small files of the data directory, which the test's process and the server's both read and write."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "faults"
        self._countdown = self._folder / "steps_to_live"

    def kill_after(self, num_steps: int) -> None:
        """The worker that is sent the ``num_steps``-th optimizer step from now on, of whatever run, dies with it."""
        self._folder.mkdir(exist_ok=True)
        self._write(self._countdown, num_steps)

    def is_last_step(self) -> bool:
        """Count an optimizer step that is sent; whether the worker dies with this one."""
        try:
            left = int(self._countdown.read_text()) - 1
        except FileNotFoundError:
            return False
        if left > 0:
            self._write(self._countdown, left)
        else:
            self._countdown.unlink()
        return left <= 0

    def note(self, pid: int | None) -> None:
        """A worker runs, as this process."""
        self._folder.mkdir(exist_ok=True)
        (self._folder / f"worker-{pid}").touch()

    def forget(self, pid: int | None) -> None:
        """That worker has ended."""
        (self._folder / f"worker-{pid}").unlink(missing_ok=True)

    def kill_now(self) -> list[int]:
        """Kill every worker that runs; gives their processes."""
        pids = [int(path.name.removeprefix("worker-")) for path in self._folder.glob("worker-*")]
        for pid in pids:
            kill(pid)
        return pids

    def _write(self, file: Path, value: int) -> None:
        fresh = file.with_suffix(".new")
        fresh.write_text(str(value))
        fresh.rename(file)


def kill(pid: int) -> None:
    """SIGKILL, unless that process has ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
