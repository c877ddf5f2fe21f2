"""Room on the disk, asked for before gigabytes are written."""

import shutil
from pathlib import Path

from selfloop.types.errors import OperationFailed

_GIB = 2**30


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raises :class:`OperationFailed` (``DiskFull``) where ``num_bytes`` more do not fit the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OperationFailed(
            f"{what} takes {num_bytes / _GIB:.1f} GiB, and {folder} has {free / _GIB:.1f} GiB free", "DiskFull"
        )
