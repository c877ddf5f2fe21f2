"""Every completion is reported until the reader's cursor has passed it, whatever is read when."""

from hypothesis import given
from hypothesis import strategies as st

from selfloop.control.sampling.completions import Completion, Completions

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("end"), st.integers(0, 30), st.one_of(st.none(), st.integers(0, 99))),
        st.tuples(st.just("read"), st.booleans(), st.none()),
    ),
    max_size=60,
)


@given(start=st.integers(1, 10**15), steps=STEPS)
def test_a_reader_that_may_lose_answers_hears_of_everything(start: int, steps: list[tuple[str, int, int | None]]):
    completions = Completions(start)
    ended: dict[str, int | None] = {}
    heard: dict[str, int | None] = {}
    cursor = 0
    for kind, value, size in [*steps, ("read", True, None)]:
        if kind == "end":
            completions.add(str(value), size, 0.0)
            ended[str(value)] = size
            continue
        found = completions.after(cursor)
        assert completions.cursor >= cursor
        if value:  # the answer arrives
            cursor = completions.cursor
            heard |= {one.key: one.size for one in found}
    assert heard == ended
    assert completions.after(cursor) == []
    assert len(completions) == 0


@given(start=st.integers(10, 10**15), foreign=st.integers(0, 2 * 10**15), num=st.integers(0, 5))
def test_a_cursor_from_elsewhere_counts_as_the_beginning(start: int, foreign: int, num: int):
    completions = Completions(start)
    for i in range(num):
        completions.add(str(i), i, 0.0)
    reported = completions.after(foreign)
    if start <= foreign <= start + num:
        assert reported == [Completion(str(i), i) for i in range(foreign - start, num)]
    else:
        assert reported == [Completion(str(i), i) for i in range(num)]


def test_what_nobody_asks_for_is_forgotten():
    completions = Completions(5)
    completions.add("old", 1, 10.0)
    completions.add("new", 1, 20.0)
    completions.forget_before(15.0)
    assert completions.after(0) == [Completion("new", 1)]
