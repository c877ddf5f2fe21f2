"""Which jobs are open, kept in a file, so that the next gateway knows what was lost with this one."""

import os
from collections.abc import Iterable
from pathlib import Path

_COMPACT_LINES = 50_000


class OpenJobs:
    """Names added and removed, a line each; what a crash of the machine may cut off is the last of them.

    Names have no whitespace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lost = _read(path)
        """Open when the gateway before this one ended."""
        self._open = dict.fromkeys(self.lost)
        self._num_lines = 0
        self._file = -1
        self._rewrite()

    def add(self, name: str) -> None:
        self._open[name] = None
        self._write(f"+{name}\n", 1)

    def remove(self, names: Iterable[str]) -> None:
        known = [name for name in names if name in self._open]
        for name in known:
            del self._open[name]
        if known:
            self._write("".join(f"-{name}\n" for name in known), len(known))

    def close(self) -> None:
        os.close(self._file)

    def _write(self, lines: str, num: int) -> None:
        os.write(self._file, lines.encode())
        self._num_lines += num
        if self._num_lines > _COMPACT_LINES and self._num_lines > 4 * len(self._open):
            os.close(self._file)
            self._rewrite()

    def _rewrite(self) -> None:
        aside = self._path.with_name(self._path.name + ".part")
        aside.write_text("".join(f"+{name}\n" for name in self._open))
        aside.replace(self._path)
        self._num_lines = len(self._open)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)


def _read(path: Path) -> list[str]:
    found: dict[str, None] = {}
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        if line[0] == "+":
            found[line[1:-1]] = None
        else:
            found.pop(line[1:-1], None)
    return list(found)
