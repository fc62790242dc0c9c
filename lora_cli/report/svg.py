"""Charts as inline SVG: axes, curves, dots, marks; and bars. Deterministic, without script, sized by the page.

All colours are classes of the page's stylesheet. Charts given the same `steps` line up below each other.
Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lora_cli.report.curves import Point, finite, thin, ticks

WIDTH = 860
LEFT = 58
RIGHT = WIDTH - 10
_TOP = 12
_X_LABELS = 24
_POINTS_PER_CURVE = 1000
_BAR_PITCH = 22
_LABEL_PITCH = 11
_BAR_NAMES = 110


@dataclass(frozen=True)
class Curve:
    points: Sequence[Point]
    css: str
    """`raw`, `smooth` or `line`; a page may have more."""
    member: str = ""
    """Whose it is, where curves are of several runs: written at its end, and in a data attribute for the script."""
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    kind: str
    """`epoch`, `checkpoint`, `resume` or `halving`."""
    text: str


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    value: float
    text: str


@dataclass(frozen=True)
class Chart:
    name: str
    """For those who can't see it."""
    steps: tuple[int, int]
    curves: Sequence[Curve]
    label: Callable[[float], str]
    """How a value is written on the axis."""
    height: int
    dots: Sequence[Point] = ()
    ringed: Point | None = None
    level: Level | None = None
    marks: Sequence[Mark] = ()
    from_zero: bool = False
    numbered: bool = True
    """Whether the steps are written below; charts that share them say so once."""
    beside: int = 0
    """Room to the right of the last step, for what is written at the ends of curves."""


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    name: str
    value: float
    text: str
    """The value in words, beside the bar."""


@dataclass(frozen=True)
class _Scale:
    """Maps `low` to `start` and `high` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element; its data attributes tell the page's script where a step stands."""
    bottom = chart.height - (_X_LABELS if chart.numbered else _TOP)
    first, last = chart.steps
    right = RIGHT - chart.beside
    across = _Scale(first, max(last, first + 1), LEFT, right)
    low, high = _range(chart)
    down = _Scale(low, high, bottom, _TOP)
    parts = [
        (
            f'<svg viewBox="0 0 {WIDTH} {chart.height}" role="img" aria-label="{escape(chart.name)}" '
            f'data-first="{first}" data-last="{max(last, first + 1)}" data-left="{LEFT}" data-right="{right}">'
        )
    ]
    parts += [_row(chart.label(value), down(value)) for value in _levels(low, high, bottom // 32)]
    if chart.numbered:
        whole = [step for step in ticks(first, max(last, first + 1), 8) if step % 1 == 0]
        parts += [_column(f"{step:,.0f}", across(step), bottom) for step in whole]
    parts += [_mark(mark, across(mark.step), bottom) for mark in chart.marks]
    parts += [_curve(curve, across, down) for curve in chart.curves]
    parts += _ends(chart.curves, across, down)
    if chart.level is not None:  # over the curves, which may run along it
        y = down(chart.level.value)
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        text = escape(chart.level.text)
        parts.append(f'<text class="halo" x="{RIGHT}" y="{y - 4:.1f}" text-anchor="end">{text}</text>')
    for x, y in thin(finite(chart.dots), _POINTS_PER_CURVE):
        parts.append(f'<circle class="dot" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>')
    if chart.ringed is not None:
        x, y = chart.ringed
        parts.append(f'<circle class="ring" cx="{across(x):.1f}" cy="{down(y):.1f}" r="7"/>')
    parts.append(f'<path class="cursor" d="M{LEFT} {_TOP}V{bottom}" visibility="hidden"/></svg>')
    return "".join(parts)


def draw_bars(name: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from zero, one below the other, as an `<svg>` element; `name` is for those who can't see it."""
    along = _Scale(0, max(bar.value for bar in bars) or 1, _BAR_NAMES, RIGHT - 70)
    parts = [f'<svg viewBox="0 0 {WIDTH} {_BAR_PITCH * len(bars)}" role="img" aria-label="{escape(name)}">']
    for index, bar in enumerate(bars):
        middle, end = _BAR_PITCH * (index + 0.5), along(bar.value)
        parts.append(f'<text x="{_BAR_NAMES - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>')
        width = end - _BAR_NAMES
        parts.append(f'<rect class="bar" x="{_BAR_NAMES}" y="{middle - 7:.1f}" width="{width:.1f}" height="14"/>')
        parts.append(f'<text x="{end + 8:.1f}" y="{middle + 4:.1f}">{escape(bar.text)}</text>')
    return "".join(parts) + "</svg>"


def _levels(low: float, high: float, count: int) -> list[float]:
    """Round values for the axis: about `count`, and never fewer than two, which is what it takes to read a curve."""
    count = max(2, count)
    while len(levels := ticks(low, high, count)) < 2 and high > low:
        count += 1
    return levels


def _range(chart: Chart) -> tuple[float, float]:
    """The values shown, with a little air above and below."""
    values = [y for points in (*(curve.points for curve in chart.curves), chart.dots) for _, y in finite(points)]
    if chart.level is not None:
        values.append(chart.level.value)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if chart.from_zero:
        low = min(low, 0.0)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if chart.from_zero else low - air), high + air


def _row(label: str, y: float) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _column(label: str, x: float, bottom: float) -> str:
    return f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'


def _mark(mark: Mark, x: float, bottom: float) -> str:
    title = f"<title>{escape(mark.text)}</title>"
    if mark.kind == "checkpoint":  # a small triangle on the axis
        return f'<path class="checkpoint" d="M{x:.1f} {bottom - 5}l4 6h-8z">{title}</path>'
    return f'<path class="{escape(mark.kind)}" d="M{x:.1f} {_TOP}V{bottom}">{title}</path>'


def _curve(curve: Curve, across: _Scale, down: _Scale) -> str:
    points = thin(finite(curve.points), _POINTS_PER_CURVE)
    if not points:
        return ""
    path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)
    # A single point has no length: a round cap makes it a dot.
    member = f' data-member="{escape(curve.member)}"' if curve.member else ""
    title = f"<title>{escape(curve.title)}</title>" if curve.title else ""
    end = f">{title}</path>" if title else "/>"
    return f'<path class="{escape(curve.css)}"{member} d="M{path}{"h0" if len(points) == 1 else ""}"{end}'


def _ends(curves: Sequence[Curve], across: _Scale, down: _Scale) -> list[str]:
    """Whose each curve is, beside its last point; where they would touch, below each other."""
    ends = [(curve, finite(curve.points)[-1]) for curve in curves if curve.member and finite(curve.points)]
    parts: list[str] = []
    lowest: dict[float, float] = {}
    for curve, (step, value) in sorted(ends, key=lambda end: -end[1][1]):
        x, y = across(step), down(value)
        y = lowest[x] = max(y, lowest.get(x, -_LABEL_PITCH) + _LABEL_PITCH)
        member = escape(curve.member)
        parts.append(f'<text class="end" data-member="{member}" x="{x + 5:.1f}" y="{y + 4:.1f}">{member}</text>')
    return parts
