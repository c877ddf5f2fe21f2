"""What a worker process wrote: JSON lines of its own, and whatever its libraries print."""

from collections.abc import Collection
from pathlib import Path

import msgspec

from selfloop.types.logline import decoder

_TAIL_BYTES = 64 * 1024


def tail(path: Path, *, since_byte: int = 0, num_lines: int, runs: Collection[str] = ()) -> list[str]:
    """The last lines written from ``since_byte`` on; lines about runs other than ``runs`` are left out."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            start = max(size - max(_TAIL_BYTES, num_lines * 256), since_byte, 0)
            file.seek(start)
            raw = file.read()
    except FileNotFoundError:
        return []
    lines = raw.decode(errors="replace").splitlines()
    if start > since_byte and lines:
        lines = lines[1:]  # Cut in the middle.
    shown = [text for line in lines if (text := _readable(line, runs))]
    return shown[-num_lines:]


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _readable(line: str, runs: Collection[str]) -> str:
    if not line.startswith("{"):
        return line
    try:
        known = decoder.decode(line)
    except msgspec.DecodeError:
        return line
    if known.run_id and known.run_id not in runs:
        return ""
    return f"{known.level} {known.logger}: {known.text}"
