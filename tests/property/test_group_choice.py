"""Which worker group capacity lives in: a rule of what the groups are, tried on any of them."""

from hypothesis import given
from hypothesis import strategies as st

from selfloop.control.capacity.group_choice import GroupView, choose

view = st.tuples(st.integers(0, 5), st.booleans(), st.booleans(), st.booleans())
fleets = (
    st.lists(view, min_size=1, max_size=6)
    .map(lambda rows: [GroupView(f"group{index}", *row) for index, row in enumerate(rows)])
    .filter(lambda groups: any(not group.is_drained for group in groups))
)


@given(fleets, st.integers(0, 6))
def test_a_group_that_is_well_keeps_what_it_has_and_others_lose_it(groups: list[GroupView], place: int) -> None:
    current = groups[place].name if place < len(groups) else None
    chosen = next(group for group in groups if group.name == choose(groups, current))
    assert not chosen.is_drained
    well = [group for group in groups if not group.is_drained and not group.is_down]
    assert not chosen.is_down or not well, "one that is down is taken only where no other is left"
    rivals = well or [group for group in groups if not group.is_drained]
    if current in {group.name for group in rivals}:
        assert chosen.name == current, "it stays where it is"
    else:
        assert chosen.num_placed == min(group.num_placed for group in rivals)
        as_few = [group for group in rivals if group.num_placed == chosen.num_placed]
        assert chosen.is_ready or not any(group.is_ready for group in as_few), "a loaded one first"


@given(st.integers(1, 6), st.integers(0, 20))
def test_runs_that_come_one_by_one_are_spread_evenly(num_groups: int, num_runs: int) -> None:
    placed = dict.fromkeys((f"group{index}" for index in range(num_groups)), 0)
    for _ in range(num_runs):
        placed[choose([GroupView(name, count, is_ready=count > 0) for name, count in placed.items()], None)] += 1
    assert max(placed.values()) - min(placed.values()) <= 1


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.data())
def test_what_a_dead_group_held_goes_where_there_is_least(counts: list[int], data: st.DataObject) -> None:
    dead = data.draw(st.integers(0, len(counts) - 1))
    held, counts[dead] = counts[dead], 0
    for _ in range(held):
        views = [GroupView(str(index), count, is_down=index == dead) for index, count in enumerate(counts)]
        chosen = int(choose(views, str(dead)))
        assert chosen != dead
        assert counts[chosen] == min(count for index, count in enumerate(counts) if index != dead)
        counts[chosen] += 1
