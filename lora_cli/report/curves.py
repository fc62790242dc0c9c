"""Curves as numbers: thinning, smoothing, axis ticks, and a sparkline of block characters.

Points are `(x, y)` in the order of x. Knows nothing about SVG, the terminal, or what a curve means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]

_BLOCKS = "▁▂▃▄▅▆▇█"


def finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` (4 or more) of the points: the first, the last, and each bucket's lowest and highest.

    A spike of a single step therefore survives, which averaging or taking every n-th point would lose.
    """
    if len(points) <= limit:
        return list(points)
    buckets = (limit - 2) // 2
    inner = len(points) - 2
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        members = range(1 + inner * bucket // buckets, 1 + inner * (bucket + 1) // buckets)
        kept.add(min(members, key=lambda index: points[index][1]))
        kept.add(max(members, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def smoothing_window(count: int) -> int:
    """How many neighbouring points are averaged: a twentieth of the curve, an odd number."""
    return max(1, count // 20 | 1)


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Centred moving average, so without lag: towards either end the window shrinks and stays centred."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    half = window // 2
    averaged = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        total = sums[index + reach + 1] - sums[index - reach]
        averaged.append((x, total / (2 * reach + 1)))
    return averaged


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within `low` and `high`, about `count` of them, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [number * gap for number in range(first, last + 1)]


def sparkline(values: Sequence[float], cells: int) -> str:
    """The whole curve in at most `cells` block characters, each the mean of its share of the values."""
    known = [value for value in values if math.isfinite(value)]
    if not known or cells < 1:
        return ""
    buckets = min(cells, len(known))
    means = []
    for bucket in range(buckets):
        share = known[len(known) * bucket // buckets : len(known) * (bucket + 1) // buckets]
        means.append(sum(share) / len(share))
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * buckets
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)
