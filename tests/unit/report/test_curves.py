from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.report.curves import smooth, smoothing_window, sparkline, thin, ticks

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(values, st.integers(4, 60))
def test_thinning_keeps_the_extremes_and_both_ends(ys: list[float], limit: int) -> None:
    points = [(float(x), y) for x, y in enumerate(ys)]
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 4)
    assert kept == sorted(set(kept) & set(points))
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert min(y for _, y in kept) == min(ys)
    assert max(y for _, y in kept) == max(ys)


@given(values)
def test_smoothing_has_no_lag(ys: list[float]) -> None:
    """A straight line, whatever its slope, stays where it is; so do the ends of any curve."""
    line = [(float(x), 3.0 * x - 7) for x in range(len(ys))]
    window = smoothing_window(len(ys))
    assert [y for _, y in smooth(line, window)] == pytest.approx([y for _, y in line])
    curve = smooth([(float(x), y) for x, y in enumerate(ys)], window)
    assert (curve[0][1], curve[-1][1]) == pytest.approx((ys[0], ys[-1]), abs=1e-3)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_lie_inside_and_are_about_as_many_as_asked(low: float, spread: float, count: int) -> None:
    high = low + spread
    marks = ticks(low, high, count)
    slack = 1e-6 * (abs(low) + spread)
    assert all(low - slack <= mark <= high + slack for mark in marks)
    assert len(marks) <= count + 2


def test_ticks_are_round() -> None:
    assert ticks(0.97, 1.43, 5) == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4])


def test_a_sparkline_falls_with_the_loss() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0] * 100, 8) == "▁" * 8
    assert sparkline([math.nan, 1.0], 8) == "▁"
    assert len(sparkline([float(value) for value in range(1000)], 12)) == 12
