import pytest

from selfloop.control.observe.billing import GIGABYTE, BillingEvent, checkpoint_events
from selfloop.storage.db.queries_billing import StoredCheckpoint

HOUR = 3600


def amounts(events: list[BillingEvent], kind: str) -> dict[int, float]:
    return {event.hour: event.amount for event in events if event.kind == kind}


def test_gigabyte_hours_of_the_hours_that_a_checkpoint_was_there_in():
    """From its saving to its expiry, in parts of hours, within the window alone."""
    stored = StoredCheckpoint("k", "s", "m", 2 * GIGABYTE, 10 * HOUR + 1800.0, 12 * HOUR + 900.0)
    events = list(checkpoint_events([stored], 0, 100 * HOUR))
    assert amounts(events, "storage") == {10 * HOUR: 1.0, 11 * HOUR: 2.0, 12 * HOUR: 0.5}
    assert amounts(events, "checkpoint") == {10 * HOUR: 1}
    within = list(checkpoint_events([stored], 11 * HOUR, 12 * HOUR))
    assert amounts(within, "storage") == {11 * HOUR: 2.0}
    assert amounts(within, "checkpoint") == {}


def test_checkpoints_of_one_session_are_added_up():
    stored = [StoredCheckpoint("k", "s", "m", GIGABYTE, 0.0, None)] * 3
    events = list(checkpoint_events(stored, 0, 2 * HOUR))
    assert amounts(events, "storage") == pytest.approx({0: 3.0, HOUR: 3.0})
    assert amounts(events, "checkpoint") == {0: 3}


def test_one_that_expires_on_the_hour_takes_nothing_of_the_next():
    stored = StoredCheckpoint("k", "s", "m", GIGABYTE, 0.0, float(HOUR))
    assert amounts(list(checkpoint_events([stored], 0, 9 * HOUR)), "storage") == {0: 1.0}
