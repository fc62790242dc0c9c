"""Charts of an evaluation as inline SVG: losses of rows before and after, and intervals below each other.

All colours are classes of the page's stylesheet. Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lora_cli.report.curves import ticks
from lora_cli.report.svg import LEFT, RIGHT, WIDTH

_BINS = 48
_HEIGHT, _TOP, _BELOW = 220, 10, 24
_FOREST_WIDTH, _FOREST_HEIGHT = 220, 18


def spread(base: Sequence[float], adapter: Sequence[float]) -> str:
    """Two histograms over one axis: how many rows have which loss, with the adapter and without."""
    known = [value for value in (*base, *adapter) if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(0.0, *known), max(known)
    high = high if high > low else low + 1.0
    counts = {name: _histogram(values, low, high) for name, values in (("base", base), ("adapter", adapter))}
    most = max(max(one) for one in counts.values())
    bottom = _HEIGHT - _BELOW

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (RIGHT - LEFT)

    def down(count: float) -> float:
        return bottom - count / most * (bottom - _TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="Losses of the rows before and after">']
    for count in ticks(0, most, 4):
        if count % 1 == 0:
            y = down(count)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{count:,.0f}</text>')
    for value in ticks(low, high, 8):
        parts.append(f'<text x="{across(value):.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    width = (RIGHT - LEFT) / _BINS
    for name, found in counts.items():
        for number, count in enumerate(found):
            if count:
                y = down(count)
                parts.append(
                    f'<rect class="bar-{name}" x="{LEFT + number * width:.1f}" y="{y:.1f}" '
                    f'width="{width - 1:.1f}" height="{bottom - y:.1f}"/>'
                )
    return "".join(parts) + "</svg>"


def _histogram(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * _BINS
    for value in values:
        if math.isfinite(value):
            counts[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    return counts


def forest(difference: float, low: float, high: float, limits: tuple[float, float], name: str) -> str:
    """One interval on an axis that others share, with where nothing changes."""
    first, last = min(0.0, limits[0]), max(0.0, limits[1])
    last = last if last > first else first + 1.0

    def across(value: float) -> float:
        return 4 + (min(max(value, first), last) - first) / (last - first) * (_FOREST_WIDTH - 8)

    middle = _FOREST_HEIGHT / 2
    parts = [
        f'<svg class="forest" viewBox="0 0 {_FOREST_WIDTH} {_FOREST_HEIGHT}" role="img" aria-label="{escape(name)}">',
        f'<path class="zero" d="M{across(0):.1f} 0V{_FOREST_HEIGHT}"/>',
    ]
    if math.isfinite(low) and math.isfinite(high):
        parts.append(f'<path class="reach" d="M{across(low):.1f} {middle}H{across(high):.1f}"/>')
    if math.isfinite(difference):
        parts.append(f'<circle class="middle" cx="{across(difference):.1f}" cy="{middle}" r="3.5"/>')
    return "".join(parts) + "</svg>"
