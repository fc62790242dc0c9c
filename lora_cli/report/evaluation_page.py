"""report.html of an evaluation: the verdict, the figures, how losses are spread, and the rows that changed most.

A pure function of the evaluation and its rows; without script, and all text is escaped. Knows nothing about folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_cli.report import assets, evaluation_assets, numbers
from lora_cli.report.comparison import FEWEST_ROWS, Comparison, Evaluation, Measure
from lora_cli.report.curves import Point
from lora_cli.report.evaluation import measure_cells, measure_name, versus
from lora_cli.report.evaluation_charts import forest, spread
from lora_cli.report.page import figure_tiles, page, warning_lines
from lora_cli.report.svg import Chart, Curve, Level, draw

Rows = Mapping[str, Sequence[Any]]
"""Columns, one value for each row: those of rows.parquet."""

STYLE = assets.STYLE + evaluation_assets.STYLE

_CHARACTERS = 1500
_CHANGE_HEIGHT = 180
_GROUPS = 30
_STEPS = (0.1, 0.5, 1.5, 4.0)
"""Nats from which a token is tinted more strongly."""


@dataclass(frozen=True)
class Piece:
    """A token's text, and how its loss changed; None where it wasn't supervised."""

    text: str
    change: float | None


@dataclass(frozen=True)
class Reading:
    """A row that changed much, as text."""

    index: int
    prompt: str
    pieces: tuple[Piece, ...]
    """What follows the prompt."""
    cut: bool
    """Whether there is more of it."""


def render_evaluation_page(evaluation: Evaluation, rows: Rows, readings: Sequence[Reading] = ()) -> str:
    """The whole page."""
    gained = [one for one in readings if _change(rows, one.index) < 0]
    lost = [one for one in readings if _change(rows, one.index) > 0]
    comparisons = (evaluation.comparison, *evaluation.others)
    return page(
        evaluation.target,
        [
            _head(evaluation),
            *(section for comparison in comparisons for section in (_figures(comparison), _groups(comparison))),
            _spread(rows),
            _changed("Most gained", rows, gained),
            _changed("Most lost", rows, lost),
        ],
        style=STYLE,
    )


def _head(evaluation: Evaluation) -> str:
    comparison = evaluation.comparison
    tokens = numbers.counted(evaluation.num_supervised_tokens, "scored token")
    line = f"{evaluation.data} · {numbers.counted(evaluation.rows, 'row')} · {tokens} · base in {comparison.precision}"
    found = {measure.name: measure for measure in comparison.measures}
    tiles = [("loss, base → adapter", _course(comparison.loss), "nats per token")]
    for name in ("token_accuracy", "choice_accuracy", "exact_match"):
        if name in found:
            tiles.append((measure_name(name), _course(found[name]), ""))
    judged = comparison.better + comparison.worse
    tiles.append(("rows better", f"{comparison.better:,} of {evaluation.rows:,}", f"{comparison.worse:,} worse"))
    if judged:
        tiles.append(("sign test", f"p {comparison.sign_test_p:.2g}", "two-sided"))
    return head(evaluation.target, line, comparison.outcome, comparison.verdict, tiles, evaluation.warnings)


def head(
    title: str, line: str, outcome: str, verdict: str, tiles: Sequence[tuple[str, str, str]], warnings: Sequence[str]
) -> str:
    """Name, verdict, a few figures (name, number, what stands below it) and the warnings."""
    kind = outcome if outcome in ("better", "worse") else "open"
    said = escape(verdict.removeprefix(f"{outcome}:").strip())
    return (
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(line)}</p>'
        f'<p class="verdict {kind}"><b>{escape(outcome)}</b> {said}</p></header>'
        + figure_tiles(tiles)
        + warning_lines(warnings)
    )


def _course(measure: Measure) -> str:
    return f"{measure.base:.4g} → {measure.adapter:.4g}"


def _figures(comparison: Comparison) -> str:
    rows = [(measure, measure_cells(measure, comparison.loss)) for measure in comparison.measures]
    beside = f" {versus(comparison.versus).capitalize()}." if comparison.versus is not None else ""
    return figures_table(
        "Base and adapter",
        f"{comparison.adapter}, base in {comparison.precision}.{beside} Pale: the interval holds 0.",
        [(cells, _open(measure)) for measure, cells in rows],
    )


def figures_table(title: str, caption: str, rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """Measures as rows of text; those that say nothing for certain in a paler ink."""
    names = ("measure", "base", "adapter", "difference", "95 % interval")
    body = [([escape(cell) for cell in cells], pale) for cells, pale in rows]
    return (
        f"<section><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>"
        f"{_numbers(names, body, certain=3)}</section>"
    )


def _numbers(names: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]], *, certain: int) -> str:
    """A table of cells that are HTML already; on a narrow page each row becomes a card, and cells bear their names.

    Args:
        rows: the cells, and whether those from column `certain` on are set in a paler ink.
    """
    header = "".join(f"<th>{name}</th>" for name in names)
    body = ""
    for cells, pale in rows:
        body += "<tr>"
        for number, (name, cell) in enumerate(zip(names, cells, strict=True)):
            ink = ' class="plain"' if pale and number >= certain else ""
            body += f'<td data-name="{name}"{ink}>{cell}</td>'
        body += "</tr>"
    return f'<table class="numbers"><tr>{header}</tr>{body}</table>'


def _open(measure: Measure) -> bool:
    """Whether the interval holds 0, or isn't one."""
    return not (measure.low > 0 or measure.high < 0)


def _groups(comparison: Comparison) -> str:
    if not comparison.groups:
        return ""
    shown = comparison.groups[:_GROUPS]
    known = [group.loss for group in shown if group.rows >= FEWEST_ROWS]
    edges = [edge for loss in known for edge in (loss.low, loss.high) if math.isfinite(edge)]
    limits = (min(edges, default=0.0), max(edges, default=0.0))
    found = {measure.name for measure in comparison.measures}
    beside = [name for name in ("exact_match", "choice_accuracy") if name in found][:1]
    rows = []
    for group in shown:
        loss, few = group.loss, group.rows < FEWEST_ROWS
        between = "too few rows" if few else f"{loss.low:+.4f} .. {loss.high:+.4f}"
        chart = "" if few else forest(loss.difference, loss.low, loss.high, limits, between)
        cells = (f"{group.rows:,}", f"{loss.base:.4f}", f"{loss.adapter:.4f}", f"{loss.difference:+.4f}", between)
        courses = {measure.name: _course(measure) for measure in group.measures}
        more = (courses.get(name, "") for name in beside)
        rows.append(((escape(group.name), *cells, chart, *more), few or _open(loss)))
    names = ("group", "rows", "base", "adapter", "difference", "95 % interval", "", *map(measure_name, beside))
    left = len(comparison.groups) - len(shown)
    others = f"; {left:,} smaller ones are in summary.json" if left else ""
    return (
        f"<section><h2>Groups</h2><figcaption>Loss in each, the largest first{others}. Of many intervals at 95 %, "
        "one in twenty misses.</figcaption>"
        f"{_numbers(names, rows, certain=4)}</section>"
    )


def _spread(rows: Rows) -> str:
    """How losses are spread before and after, and the change of each row."""
    changes = sorted(_change(rows, index) for index in range(len(rows["place"])))
    change = Chart(
        name="Change of each row's loss, in order",
        steps=(1, len(changes)),
        curves=[Curve(_in_order(changes), "line")],
        label=lambda value: f"{value:+.1f}" if abs(value) >= 0.05 or value == 0 else f"{value:+.2g}",
        height=_CHANGE_HEIGHT,
        level=Level(0.0, "unchanged"),
    )
    return (
        "<section><h2>Losses</h2><figure>"
        "<figcaption>How many rows have which loss, in nats per token:"
        '<span class="key key-base"></span>base<span class="key key-adapter"></span>adapter</figcaption>'
        f"{spread(rows['base_loss'], rows['adapter_loss'])}</figure><figure>"
        "<figcaption>What the adapter changes in each row, most gained first.</figcaption>"
        f"{draw(change)}</figure></section>"
    )


def _in_order(values: Sequence[float]) -> list[Point]:
    return [(float(rank), float(value)) for rank, value in enumerate(values, start=1)]


def _change(rows: Rows, index: int) -> float:
    return float(rows["adapter_loss"][index] - rows["base_loss"][index])


def _changed(title: str, rows: Rows, readings: Sequence[Reading]) -> str:
    if not readings:
        return ""
    note = "The reference, tinted where the adapter finds a token likelier (green) or less likely (orange)."
    cards = "".join(_card(rows, reading) for reading in readings)
    return f"<section><h2>{title}</h2><figcaption>{note}</figcaption>{cards}</section>"


def _card(rows: Rows, reading: Reading) -> str:
    index = reading.index
    losses = f"{rows['base_loss'][index]:.4f} → {rows['adapter_loss'][index]:.4f}"
    top = f"<span>{escape(str(rows['place'][index]))}</span><b>{losses}</b>"
    prompt = f'<p class="prompt words soft">{escape(_clipped(reading.prompt))}</p>' if reading.prompt else ""
    words = "".join(map(_tinted, reading.pieces)) + (" ..." if reading.cut else "")
    answers = ""
    if rows.get("prompt") and rows["prompt"][index] is not None:
        columns = "".join(
            f'<div><span class="soft">{who}</span>{_verdict(rows, who, index)}'
            f'<p class="words">{escape(_clipped(rows[f"{who}_answer"][index]))}</p></div>'
            for who in ("base", "adapter")
        )
        answers = f'<div class="answers two read">{columns}</div>'
    return (
        f'<div class="sample"><div class="row-head">{top}</div>{prompt}'
        f'<div class="read"><span class="soft">reference</span><p class="words">{words}</p></div>{answers}</div>'
    )


def _verdict(rows: Rows, who: str, index: int) -> str:
    same = rows[f"{who}_answer"][index].strip() == rows["reference"][index].strip()
    return ' <span class="same">as the reference</span>' if same else ""


def _tinted(piece: Piece) -> str:
    if piece.change is None or abs(piece.change) < _STEPS[0]:
        return escape(piece.text)
    strength = sum(abs(piece.change) >= step for step in _STEPS)
    return f'<span class="{"d" if piece.change < 0 else "u"}{strength}">{escape(piece.text)}</span>'


def _clipped(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ..."
