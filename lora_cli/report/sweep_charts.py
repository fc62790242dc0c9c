"""Charts of a sweep as inline SVG: the losses of all members over steps, and the loss that each value of a setting had.

Members are told apart by their places in the leaderboard. All colours are classes of the page's stylesheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_cli.report.curves import Point, finite, smooth, smoothing_window, ticks
from lora_cli.report.svg import Chart, Curve, Mark, draw

_LOSS_HEIGHT = 320
_PLACES_WIDTH = 22
_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW = 420, 190, 52, 10, 24


@dataclass(frozen=True)
class Course:
    """A member on its way."""

    place: int
    """In the leaderboard, from 1."""
    name: str
    lines: Sequence[Mapping[str, Any]]
    """Its metrics.jsonl."""
    early: bool
    """Whether it ended before its last step."""


def loss_figure(courses: Sequence[Course], key: str, name: str, rungs: Sequence[Mapping[str, Any]]) -> str:
    """One curve for each member, the best on top; empty where there is nothing to draw.

    Args:
        key: `loss` or `eval_loss`.
    """
    found = {course.place: points for course in courses if len(points := _points(course, key)) > 1}
    starts = [points[0][1] for points in found.values()]
    if not starts:
        return ""
    most = max(starts) + 0.05 * abs(max(starts))
    clipped = any(y > most for points in found.values() for _, y in points)
    window = 1 if key == "eval_loss" else smoothing_window(max(map(len, found.values())))
    curves = []
    for course in sorted((c for c in courses if c.place in found), key=lambda course: -course.place):
        points = [(x, min(y, most)) for x, y in smooth(found[course.place], window)]
        css = "member best" if course.place == 1 else "member early" if course.early else "member"
        curves.append(Curve(points, css, str(course.place), course.name))
    steps = [x for points in found.values() for x, _ in points]
    chart = Chart(
        name=name,
        steps=(int(min(steps)), int(max(steps))),
        curves=curves,
        label=lambda value: f"{value:.3g}",
        height=_LOSS_HEIGHT,
        marks=[Mark(rung["step"], "epoch", f"halving at step {rung['step']:,}") for rung in rungs],
        beside=_PLACES_WIDTH,
    )
    note = f"Centred moving average over {window} log lines. " if window > 1 else ""
    note += f"Losses above {most:.3g} are drawn there. " if clipped else ""
    note = f"<figcaption>{note.rstrip()}</figcaption>" if note else ""
    return f"<figure><h3>{escape(name)}</h3>{note}{draw(chart)}</figure>"


def _points(course: Course, key: str) -> list[Point]:
    return finite([(line["step"], line[key]) for line in course.lines if line.get(key) is not None])


@dataclass(frozen=True)
class Outcome:
    """What a member came to."""

    place: int
    name: str
    value: int
    """Which of a setting's values it has."""
    loss: float
    early: bool
    """Whether it ended before its last step; its loss is of another step then."""


def strip(setting: str, values: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """The members' losses by their value of a setting; a line joins the best that took all steps of each value."""
    known = [outcome for outcome in outcomes if math.isfinite(outcome.loss)]
    if not known:
        return ""
    whole = [outcome for outcome in known if not outcome.early]
    best = [min((o.loss for o in whole if o.value == number), default=math.nan) for number in range(len(values))]
    low, high = min(o.loss for o in known), max(o.loss for o in known)
    air = (high - low) * 0.08 or 0.1 * abs(high) or 1.0
    low, high, bottom = low - air, high + air, _HEIGHT - _BELOW
    pitch = (_WIDTH - _LEFT) / len(values)

    def across(value: int) -> float:
        return _LEFT + (value + 0.5) * pitch

    def down(loss: float) -> float:
        return bottom - (loss - low) / (high - low) * (bottom - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(setting)}">']
    for value in ticks(low, high, 4):
        y = down(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    room = max(3, int(pitch / 6.5))
    for number, text in enumerate(values):
        shown = escape(text if len(text) <= room else text[: room - 1] + "…")
        title = f"<title>{escape(text)}</title>" if len(text) > room else ""
        x = across(number)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{shown}{title}</text>')
    joined = [(across(number), down(loss)) for number, loss in enumerate(best) if math.isfinite(loss)]
    if joined:
        parts.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in joined)}"/>')
    for outcome in sorted(known, key=lambda outcome: -outcome.place):
        css = "spot best" if outcome.place == 1 else "spot early" if outcome.early else "spot"
        parts.append(
            f'<circle class="{css}" data-member="{outcome.place}" cx="{across(outcome.value):.1f}" '
            f'cy="{down(outcome.loss):.1f}" r="4"><title>{escape(outcome.name)}</title></circle>'
        )
    return "".join(parts) + "</svg>"
