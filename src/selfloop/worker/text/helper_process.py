"""A process that does for a worker what could run away: it is asked in lines, and the system ends it."""

import atexit
import contextlib
import select
import subprocess
import sys


class HelperEnded(Exception):
    """It gave no answer. ``status`` is how it exited; below zero it is the signal that ended it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exited with status {status}")
        self.status = status


class Helper:
    """Started when it is first asked, and again after it ended.

    Args:
        module: the program; it answers each line on its stdin with one on its stdout.
        patience_s: one that takes longer is ended.
    """

    def __init__(self, module: str, patience_s: float) -> None:
        self._module = module
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(self, line: bytes) -> bytes:
        """Its answer to ``line``, which has no line end. Raises :class:`HelperEnded`."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        # One that ends before it has read everything has no answer either.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self._patience_s)
        answer = process.stdout.readline() if ready else b""
        if not answer.endswith(b"\n"):
            if not ready:
                process.kill()
            status = process.wait()
            self.close()
            raise HelperEnded(status)
        return answer

    def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process
