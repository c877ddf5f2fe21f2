"""The disk is full, the database is locked, the system is out of descriptors: what passes, and how to wait for it."""

import errno
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from selfloop.types.errors import NotReady, Unavailable

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

_PASSING_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
# So often an error that does not pass by itself is met in a row, before it is the outcome.
_MAX_SETBACKS = 3
_TOLD = (1, 2, 3, 10, 60)

TRANSIENT_ERRORS: tuple[type[Exception], ...] = (OSError, OperationalError, InterfaceError, PoolTimeout)
"""Errors that :func:`not_ready` looks at."""


def is_passing(error: Exception) -> bool:
    """Whether the same work may succeed later, with nothing repaired but the outage itself."""
    if isinstance(error, OSError):
        return error.errno in _PASSING
    if isinstance(error, OperationalError | InterfaceError):
        # What cannot be decoded, or is no table any more, is so the next time, too.
        if not isinstance(error.orig, sqlite3.Error):
            return True
        return getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF in _PASSING_SQLITE
    return isinstance(error, PoolTimeout | Unavailable)


def in_words(error: Exception) -> str:
    """The error as it may be reported; of the database's, without the statement."""
    return str(getattr(error, "orig", None) or error)


def not_ready(error: Exception) -> NotReady | None:
    """What to answer a caller whose request met an outage: nothing was accepted, ask again; None for other errors."""
    if isinstance(error, OSError):
        if error.errno not in _PASSING:
            return None
        return NotReady(f"the server cannot store anything just now ({error.strerror}); nothing was accepted", _RETRY_S)
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout) and is_passing(error):
        return NotReady(
            f"the server's database does not answer just now ({in_words(error)}); nothing was accepted", _RETRY_S
        )
    return None


@contextmanager
def tried(what: str) -> Generator[None]:
    """For work that is done over and over: an outage costs this time, and is logged."""
    try:
        yield
    except (OSError, SQLAlchemyError, Unavailable):
        log.exception("%s: left for the next time", what)


class Setbacks:
    """Errors in a row of work that is tried again after each."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._num = 0

    def met(self, error: Exception) -> bool:
        """Log it, though not a traceback a second for hours; True when it does not pass and was met often enough."""
        self._num += 1
        if self._num in _TOLD or self._num % _TOLD[-1] == 0:
            log.error("%s: try %d failed, another follows", self._who, self._num, exc_info=error)
        return not is_passing(error) and self._num == _MAX_SETBACKS

    def over(self) -> None:
        """It went well."""
        self._num = 0


class Ages:
    """Tells which stored times are at least ``age_s`` old, however the wall clock is set meanwhile.

    Stored times are of the wall clock, which may jump; so what it showed is noted beside the monotonic clock. Of a time
    before this process it knows nothing, and takes the clock as it was at the start.
    """

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._seen: deque[tuple[float, float]] = deque([(time.monotonic() - age_s, time.time() - age_s)])

    def old(self) -> float:
        """A wall time such that everything stored before it is old; to be asked now and then."""
        now, wall = time.monotonic(), time.time()
        self._seen.append((now, wall))
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._age_s:
            self._seen.popleft()
        # After a jump ahead the first bound holds back, after one backwards the second.
        return min(self._seen[0][1], wall - self._age_s)
