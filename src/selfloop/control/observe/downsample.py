"""A long curve by few of its points."""

from collections.abc import Sequence
from itertools import pairwise


def largest_triangles(xs: Sequence[float], ys: Sequence[float], num_points: int) -> list[int]:
    """Places of ``num_points`` points (at least 3) that look like the whole curve, its first and last among them.

    Largest triangle three buckets: of each bucket the point that spans the largest triangle with the one chosen before
    and the mean of the next bucket, so that peaks stay. Steinarsson 2013, "Downsampling Time Series for Visual
    Representation", section 4.2, http://hdl.handle.net/1946/15343. ``xs`` ascend, ``ys`` are finite.
    """
    num = len(xs)
    if num <= num_points:
        return list(range(num))
    width = (num - 2) / (num_points - 2)
    starts = [1 + int(bucket * width) for bucket in range(num_points - 2)] + [num - 1]
    chosen = [0]
    for place, (start, end) in enumerate(pairwise(starts)):
        next_end = starts[place + 2] if place + 2 < len(starts) else num
        x_next, y_next = sum(xs[end:next_end]) / (next_end - end), sum(ys[end:next_end]) / (next_end - end)
        x, y = xs[chosen[-1]], ys[chosen[-1]]
        areas = [abs((x - x_next) * (ys[i] - y) - (x - xs[i]) * (y_next - y)) for i in range(start, end)]
        chosen.append(start + max(range(len(areas)), key=areas.__getitem__))
    return [*chosen, num - 1]
