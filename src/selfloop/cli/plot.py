"""A curve in a terminal: braille dots where they can be shown, else plain ASCII."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 80
_HEIGHT = 6
_LABEL = 10
# Dots of a braille cell by column and row, as bits above U+2800 (Unicode 16.0, section 21.1).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800


class Bounds(NamedTuple):
    """What the axes span."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float


def bounds(*curves: tuple[Sequence[float], Sequence[float]]) -> Bounds:
    """Of all points of the curves, of which there is at least one."""
    xs = [x for curve in curves for x in curve[0]]
    ys = [y for curve in curves for y in curve[1]]
    return Bounds(min(xs), max(xs), min(ys), max(ys))


def shows_utf8() -> bool:
    """Whether standard output is a terminal that takes more than ASCII."""
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def plot(xs: Sequence[float], ys: Sequence[float], box: Bounds, *, braille: bool) -> list[str]:
    """Lines of at most :data:`WIDTH` columns: the points joined by straight lines, with both axes' bounds."""
    columns = WIDTH - _LABEL - 2
    across, down = (2, 4) if braille else (1, 1)
    dots = _joined(xs, ys, box, columns * across, _HEIGHT * down)
    rows = [_row(dots, place, columns, braille=braille) for place in range(_HEIGHT)]
    labels = {0: number(box.y_max), _HEIGHT - 1: number(box.y_min)}
    bar = "┤" if braille else "|"
    lines = [f"{labels.get(place, ''):>{_LABEL}} {bar}{row}".rstrip() for place, row in enumerate(rows)]
    left, right = f"step {box.x_min:g}", f"{box.x_max:g}"
    return [*lines, f"{'':{_LABEL}}  {left}{right:>{columns - len(left)}}"]


def number(value: float) -> str:
    """In at most ten characters."""
    return f"{value:.4g}"


def _joined(xs: Sequence[float], ys: Sequence[float], box: Bounds, width: int, height: int) -> set[tuple[int, int]]:
    """Dots (column, row from the top) of the curve."""
    columns = [round(_share(x, box.x_min, box.x_max) * (width - 1)) for x in xs]
    rows = [round((1 - _share(y, box.y_min, box.y_max)) * (height - 1)) for y in ys]
    dots: set[tuple[int, int]] = set()
    for place, (column, row) in enumerate(zip(columns, rows, strict=True)):
        to_column, to_row = columns[max(place - 1, 0)], rows[max(place - 1, 0)]
        num = max(abs(to_column - column), abs(to_row - row), 1)
        for i in range(num + 1):
            dots.add((round(column + (to_column - column) * i / num), round(row + (to_row - row) * i / num)))
    return dots


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if not math.isfinite(high - low) or high == low else (value - low) / (high - low)


def _row(dots: set[tuple[int, int]], row: int, columns: int, *, braille: bool) -> str:
    if not braille:
        return "".join("*" if (column, row) in dots else " " for column in range(columns))
    cells = [
        sum(_DOTS[dx][dy] for dx in range(2) for dy in range(4) if (2 * column + dx, 4 * row + dy) in dots)
        for column in range(columns)
    ]
    return "".join(chr(_BRAILLE + cell) if cell else " " for cell in cells)
