"""The error tree. Each dialect maps it to its own shape in one place.

SelfloopError
├── BadRequest(field, expected)      the request is wrong; repeating it cannot help
├── Denied                           no key, or a wrong one
├── Forbidden(role)                  the key's role does not allow it
├── NotFound(kind, id)               unknown here, or another team's
├── Conflict                         right in itself, but not now or not twice
├── TooLarge(limit)                  over a size limit
├── NotReady(reason, retry_s)        the same request will work later
│   ├── Unavailable                  what the server keeps its data in cannot be reached
│   └── RateLimited                  because the key asks for too much at once
├── OperationFailed(cause)           an accepted operation ended in an error
│   └── CheckpointDamaged(file)      because a file of a checkpoint is not what was written
└── WorkerLost                       the process that computed it died
"""

import errno


class SelfloopError(Exception):
    """Base of every error that a caller is meant to see; ``reason`` is a stable code finer than the class."""

    reason: str | None = None


class BadRequest(SelfloopError):
    """A field has a value that cannot be served.

    Args:
        field: path of the offending field as the client wrote it, e.g. ``data[3].loss_fn_inputs.weights``.
        expected: what would have been right, in words.
    """

    def __init__(self, field: str, expected: str, *, reason: str | None = None) -> None:
        super().__init__(f"{field}: {expected}")
        self.field = field
        self.expected = expected
        self.reason = reason


class Denied(SelfloopError):
    """No valid API key came with the request."""


class Forbidden(SelfloopError):
    """The key is valid, and its role does not allow this."""

    def __init__(self, role: str, needed: str) -> None:
        super().__init__(f"a {role} key may not do this: it takes {needed}")


class NotFound(SelfloopError):
    """The named thing does not exist for this caller."""

    def __init__(self, kind: str, id: str, hint: str = "") -> None:
        super().__init__(f"{kind} {id!r} not found" + (f"; {hint}" if hint else ""))
        self.kind = kind
        self.id = id


class Conflict(SelfloopError):
    """The request contradicts what already happened."""

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class TooLarge(SelfloopError):
    """A body or a sequence is over its limit."""

    def __init__(self, what: str, limit: int, unit: str) -> None:
        super().__init__(f"{what}: at most {limit} {unit}")
        self.what = what
        self.limit = limit


class NotReady(SelfloopError):
    """The same request will succeed later."""

    def __init__(self, reason: str, retry_s: float) -> None:
        super().__init__(reason)
        self.retry_s = retry_s


class Unavailable(NotReady):
    """The database or the store of checkpoints cannot be reached; nothing was changed."""


class RateLimited(NotReady):
    """The key is over a limit that the server was started with."""


class OperationFailed(SelfloopError):
    """An accepted operation ended in an error; ``error_class`` names its kind for the client.

    ``state_lost``: the worker has dropped its run, whose state may have been half changed.
    """

    def __init__(self, cause: str, error_class: str = "OperationFailed", *, state_lost: bool = False) -> None:
        super().__init__(cause)
        self.error_class = error_class
        self.state_lost = state_lost


class CheckpointDamaged(OperationFailed):
    """A stored file changed on the disk, or is gone; the cause names it. Nothing of it was used."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause, "CheckpointDamaged")


class WorkerLost(SelfloopError):
    """The worker process has ended; ``begun`` is whether it had begun the call that this error answers.

    ``by_kernel``: the kernel ended it for want of memory.
    """

    def __init__(self, reason: str, *, begun: bool = False, by_kernel: bool = False) -> None:
        super().__init__(reason)
        self.begun = begun
        self.by_kernel = by_kernel


MODEL_INVALID = "ModelInvalid"
"""``error_class`` of a model folder that cannot be loaded, however often it is tried."""


def model_invalid(cause: str) -> OperationFailed:
    """The error of a folder that holds no model that can be loaded."""
    return OperationFailed(cause, MODEL_INVALID)


# Of bytes, of files (inodes), of this user's quota; or of anything.
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
