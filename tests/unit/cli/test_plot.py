"""Curves in a terminal."""

import math

import pytest

from selfloop.cli import plot

RISING = [float(x) for x in range(100)]


@pytest.mark.parametrize("braille", [True, False])
def test_a_drawing_fits_a_terminal(braille: bool):
    ys = [1e-5 * math.sin(x / 7) for x in RISING]
    lines = plot.plot(RISING, ys, plot.bounds((RISING, ys)), braille=braille)
    assert all(len(line) <= plot.WIDTH for line in lines)
    assert braille != "\n".join(lines).isascii()


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right():
    first, *_, last, axis = plot.plot(RISING, RISING, plot.bounds((RISING, RISING)), braille=False)
    assert first.strip().startswith("99 |")
    assert first.endswith("*")
    assert last.strip().startswith("0 |*")
    assert axis.split() == ["step", "0", "99"]


def test_braille_dots_are_where_the_points_are():
    lines = plot.plot([0.0, 1.0], [0.0, 1.0], plot.Bounds(0.0, 1.0, 0.0, 1.0), braille=True)
    # The lower left dot of the lower left cell, the upper right one of the upper right cell.
    assert ord(lines[-2].split("┤")[1][0]) & 0x40
    assert ord(lines[0][-1]) & 0x08


@pytest.mark.parametrize(("xs", "ys"), [([3.0], [2.5]), ([1.0, 2.0, 3.0], [7.0, 7.0, 7.0])])
def test_a_point_and_a_flat_line_are_drawn(xs: list[float], ys: list[float]):
    lines = plot.plot(xs, ys, plot.bounds((xs, ys)), braille=False)
    assert sum(line.count("*") for line in lines) >= 1
