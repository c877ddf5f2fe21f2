"""What passes by itself, and clocks that jump."""

import errno
import sqlite3

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from selfloop.control.data_dir import transient_errors
from selfloop.control.data_dir.disk_space import OUTCOME_BYTES, DiskRoom
from selfloop.control.data_dir.transient_errors import Ages, not_ready
from selfloop.types.errors import NotReady


def locked() -> sqlite3.OperationalError:
    """As SQLite itself raises it."""
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


def test_an_outage_says_when_to_ask_again():
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        OperationalError("INSERT", {}, locked()),
    ):
        answer = not_ready(error)
        assert answer is not None
        assert answer.retry_s > 0
        assert "nothing was accepted" in str(answer)
    assert not_ready(OSError(errno.EACCES, "Permission denied")) is None
    undecodable = sqlite3.OperationalError("Could not decode to UTF-8 column 'name'")
    assert not_ready(OperationalError("SELECT", {}, undecodable)) is None
    assert not_ready(IntegrityError("INSERT", {}, sqlite3.IntegrityError("taken"))) is None


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.passed_s, self.jump_s = 0.0, 0.0

    def monotonic(self) -> float:
        return 50.0 + self.passed_s

    def time(self) -> float:
        return 1e9 + self.passed_s + self.jump_s


@pytest.mark.parametrize("jump_s", [0.0, 86400.0, -86400.0])
def test_nothing_is_old_before_its_time_however_the_clock_jumps(monkeypatch: pytest.MonkeyPatch, jump_s: float):
    clock = Clock()
    monkeypatch.setattr(transient_errors, "time", clock)
    ages = Ages(3600.0)
    stored: list[tuple[float, float]] = []
    for minute in range(300):
        clock.passed_s = minute * 60.0
        clock.jump_s = jump_s if minute >= 100 else 0.0
        stored.append((clock.passed_s, clock.time()))
        before = ages.old()
        gone = [passed for passed, wall in stored if wall < before]
        assert all(clock.passed_s - passed >= 3600.0 for passed in gone), minute
    if jump_s >= 0:
        assert len(gone) > 200, "what is old is let go of"


class FullBlobs:
    root = "/data"

    def free_bytes(self) -> int:
        return OUTCOME_BYTES + 1000


def test_a_full_disk_refuses_before_anything_is_accepted():
    room = DiskRoom(FullBlobs(), None)  # type: ignore[arg-type]
    room.check_accept(1000)
    with pytest.raises(NotReady, match="nothing was accepted"):
        room.check_accept(1001)
