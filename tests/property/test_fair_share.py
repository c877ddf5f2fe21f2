"""The schedule's promises, on a clock of our own."""

from hypothesis import given, settings
from hypothesis import strategies as st

from selfloop.worker.serving.fair_share import FairShare

UNITS = st.floats(0.01, 2.0)


def serve(share: FairShare[str], units: dict[str, float], seconds: float) -> dict[str, float]:
    """Give turns of each member's own length until so much time has passed; the time each had."""
    used = dict.fromkeys(units, 0.0)
    while sum(used.values()) < seconds:
        first = share.in_turn()[0]
        share.charge(first, units[first])
        used[first] += units[first]
    return used


@settings(max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(UNITS, st.floats(0.1, 10.0)), min_size=2, max_size=8))
def test_busy_members_get_time_by_their_weights(members: dict[str, tuple[float, float]]):
    """Whatever the length of a turn: no two are further apart than one turn of each."""
    share: FairShare[str] = FairShare()
    for key, (_, weight) in members.items():
        share.join(key, weight)
    units = {key: unit for key, (unit, _) in members.items()}
    used = serve(share, units, 50.0)
    for one, (unit, weight) in members.items():
        for other, (other_unit, other_weight) in members.items():
            apart = abs(used[one] / weight - used[other] / other_weight)
            assert apart <= unit / weight + other_unit / other_weight + 1e-6


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), UNITS), max_size=150), UNITS)
def test_who_comes_waits_for_one_turn_of_each_other_at_most(events: list[tuple[int, bool, float]], unit: float):
    """Members come, go and are served at will; a newcomer is then served within a round."""
    share: FairShare[int] = FairShare()
    for key, comes, seconds in events:
        if comes:
            share.join(key)
        else:
            share.leave(key)
        for first in share.in_turn()[:1]:
            share.charge(first, seconds)
    share.join(99)
    turns: list[int] = []
    while 99 not in turns:
        turns.append(share.in_turn()[0])
        share.charge(turns[-1], unit)
    waited = {key: turns.count(key) for key in turns if key != 99}
    # Beyond one turn a member gets only what it has to make up, which is a turn's length at most.
    assert all(count * unit <= 2.0 + 2 * unit for count in waited.values())


def test_idle_time_is_not_saved_and_debt_is_not_forgotten():
    share: FairShare[str] = FairShare()
    share.join("busy")
    share.charge("busy", 100.0)
    share.join("new")
    share.charge("busy", 1.0)
    share.charge("new", 1.0)
    # "new" is level with where "busy" began, not a hundred seconds behind it.
    used = serve(share, {"busy": 1.0, "new": 1.0}, 400.0)
    assert abs(used["busy"] - used["new"]) <= 102
    # One that leaves after each long turn does not come back as if it had taken none.
    share = FairShare()
    share.join("small")
    used = {"small": 0.0, "large": 0.0}
    for _ in range(2000):
        share.join("large")
        first = share.in_turn()[0]
        share.charge(first, 1.0 if first == "large" else 0.01)
        used[first] += 1.0 if first == "large" else 0.01
        if first == "large":
            share.leave("large")
    assert used["small"] >= 0.45 * sum(used.values())
