"""Packing loses nothing and keeps its budget."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from selfloop.engine.train.batch import pack

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_every_sequence_once_in_order_and_within_budget(lengths, budget):
    groups = pack(lengths, budget)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget


@given(LENGTHS, st.integers(1, 100), st.integers(1, 3))
def test_units_of_rows_stay_together(lengths, budget, rows):
    lengths = lengths[: len(lengths) // rows * rows]
    groups = pack(lengths, budget, rows)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    for group in groups:
        assert group[0] % rows == 0
        assert len(group) % rows == 0
        assert len(group) == rows or sum(lengths[i] for i in group) <= budget
    for group, following in itertools.pairwise(groups):
        unit = sum(lengths[i] for i in following[:rows])
        assert sum(lengths[i] for i in group) + unit > budget


@given(LENGTHS, st.integers(1, 100))
def test_no_group_could_have_taken_the_next_sequence(lengths, budget):
    groups = pack(lengths, budget)
    for group, following in itertools.pairwise(groups):
        assert sum(lengths[i] for i in group) + lengths[following[0]] > budget
