"""Metrics by the minute: counts, concurrency by time, percentiles within their documented accuracy."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.control.observe.meter import Meter, Minute, Usage, bucket_of, decoder, encode, middle_ms, steps

START = 1_700_000_040.0
"""The start of a minute."""


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@given(st.floats(0.001, 3600))
def test_a_response_time_is_within_ten_percent(seconds: float):
    assert middle_ms(bucket_of(seconds)) == pytest.approx(seconds * 1000, rel=0.1)


def test_percentiles_are_those_of_the_requests():
    rng = random.Random(5)
    times = [rng.lognormvariate(-2, 1.5) for _ in range(5000)]
    meter = Meter(Clock())
    for seconds in times:
        meter.count("d", 200, seconds)
    ((_, minute),) = meter.unstored("d")
    ordered = sorted(times)
    for fraction in (0.5, 0.95, 0.99):
        exact = ordered[int(fraction * len(ordered)) - 1] * 1000
        assert minute.percentile_ms(fraction) == pytest.approx(exact, rel=0.1)
    assert Minute().percentile_ms(0.5) is None


def test_statuses_count_by_class_and_concurrency_by_time():
    clock = Clock()
    meter = Meter(clock)
    meter.begin("d")
    clock.now += 10
    meter.begin("d")
    clock.now += 10
    meter.end("d", 200, 20.0)
    meter.end("d", 503, 10.0)
    meter.count("d", 422, 0.01)
    meter.begin("d")
    meter.end("d", None, 0.0)
    clock.now += 10
    ((start, minute),) = meter.unstored("d")
    assert start == START
    assert minute.statuses == {2: 1, 5: 1, 4: 1}
    assert (minute.request_s, minute.observed_s) == (30.0, 30.0)


def test_a_request_over_several_minutes_is_in_progress_in_each():
    clock = Clock()
    meter = Meter(clock)
    clock.now += 30
    meter.begin("d")
    clock.now += 120
    meter.end("d", 200, 120.0)
    found = dict(meter.unstored("d"))
    assert {start - START: (m.request_s, m.statuses) for start, m in found.items()} == {
        0: (30.0, {}),
        60: (60.0, {}),
        120: (30.0, {2: 1}),
    }
    closed = meter.take_closed()
    assert [(id, start - START) for id, start, _ in closed] == [("d", 0), ("d", 60)]
    assert [start - START for start, _ in meter.unstored("d")] == [120]
    meter.put_back(closed)
    assert len(meter.unstored("d")) == 3
    assert len(meter.take_all()) == 3


def test_who_is_no_longer_used_is_forgotten():
    clock = Clock()
    meter = Meter(clock)
    meter.count("d", 200, 0.1)
    clock.now += 600
    assert len(meter.take_closed()) == 1
    assert meter.take_closed() == []
    assert meter._live == {}
    assert meter.unstored("d") == []


def test_minutes_survive_storage_and_add_up_to_steps():
    first, second = Minute(statuses={2: 3}, times={4: 3}), Minute(statuses={2: 1, 4: 1}, times={4: 1, 9: 1})
    look = Usage(0.5, 100, 10, 40, {0: (1000, 0.25)})
    for minute in (first, second, second):
        minute.look(look)
    assert decoder.decode(encode(second)) == second
    start = int(START) // 120 * 120
    (step, after) = steps(
        [(start, first), (start + 60, second), (start + 120, Minute(statuses={2: 1}))], 120, start + 130
    )
    assert (step.start, step.seconds) == (start, 120)
    assert step.sums.statuses == {2: 4, 4: 1}
    assert step.sums.times == {4: 4, 9: 1}
    assert (step.sums.num_looks, step.sums.cpu_cores, step.sums.memory_bytes) == (3, 1.5, 300)
    assert (step.sums.gpus[0].num, step.sums.gpus[0].memory_bytes) == (3, 3000)
    assert (after.start, after.seconds) == (start + 120, 10)
