"""Errors of a disk that takes no more: of bytes, of files (inodes), of this user's quota; or of anything."""

import errno

from selfloop.types.errors import OperationFailed

_FULL = {
    errno.ENOSPC: "it has no room left, for bytes or for files (inodes)",
    errno.EDQUOT: "the quota of this user is used up",
    errno.EFBIG: "a file would be larger than it or this process may have",
    errno.EROFS: "it is mounted read-only",
}


def disk_full(error: OSError) -> OperationFailed | None:
    """The message for a save that did not fit on the disk; None for other errors."""
    if error.errno not in _FULL:
        return None
    return OperationFailed(
        f"the disk takes no more: {_FULL[error.errno]} ({error.strerror}). Nothing was kept; make room, and save again",
        "DiskFull",
    )
