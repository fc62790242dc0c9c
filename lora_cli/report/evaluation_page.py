"""report.html of an evaluation: the verdict, the figures, how losses are spread, and the rows that changed most.

A pure function of the evaluation and its rows; without script, and all text is escaped. Knows nothing about folders.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lora_cli.report import numbers
from lora_cli.report.assets import STYLE
from lora_cli.report.comparison import Comparison, Evaluation, Measure
from lora_cli.report.curves import Point
from lora_cli.report.sections import Sample, render_samples
from lora_cli.report.svg import Chart, Curve, Level, draw

Rows = Mapping[str, Sequence[Any]]
"""Columns, one value for each row: those of rows.parquet."""

_SHOWN = 5
"""Rows that gained most, and as many that lost most."""
_CHARACTERS = 600
_LOSS_HEIGHT, _CHANGE_HEIGHT = 220, 180


def render_evaluation_page(evaluation: Evaluation, rows: Rows) -> str:
    """The whole page."""
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    body = [
        _head(evaluation),
        *(_figures(comparison) for comparison in (evaluation.comparison, *evaluation.others)),
        _spread(rows),
        *(_changed(title, rows, order) for title, order in _extremes(rows).items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(evaluation.target)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(evaluation: Evaluation) -> str:
    rows = numbers.counted(evaluation.rows, "row")
    tokens = numbers.counted(evaluation.num_supervised_tokens, "scored token")
    line = escape(f"{evaluation.data} · {rows} · {tokens} · base in {evaluation.comparison.precision}")
    warnings = "".join(f'<p class="warning"><b>!</b> {escape(text)}</p>' for text in evaluation.warnings)
    return (
        f'<header><h1>{escape(evaluation.target)}</h1><p class="soft">{line}</p></header>'
        f"<p>{escape(evaluation.comparison.verdict)}</p>{warnings}"
    )


def _figures(comparison: Comparison) -> str:
    heads = ("measure", "base", "adapter", "difference", "95 % interval")
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in _cells(m))}</tr>" for m in comparison.measures)
    rows = f"{comparison.better:,} rows better, {comparison.worse:,} worse; sign test p {comparison.sign_test_p:.2g}"
    title = escape(f"{comparison.adapter}, base in {comparison.precision}")
    return (
        f"<section><h2>Base and adapter</h2><figcaption>{title}</figcaption>"
        f"<table><tr>{head}</tr>{body}</table><figcaption>{rows}</figcaption></section>"
    )


def _cells(measure: Measure) -> tuple[str, ...]:
    return (
        escape(measure.name.replace("_", " ")),
        f"{measure.base:.4f}",
        f"{measure.adapter:.4f}",
        f"{measure.difference:+.4f}",
        f"{measure.low:+.4f} .. {measure.high:+.4f}",
    )


def _spread(rows: Rows) -> str:
    """Two charts over the rows in order: their losses before and after, and the change of each."""
    count = len(rows["place"])
    changes = [after - before for before, after in zip(rows["base_loss"], rows["adapter_loss"], strict=True)]
    losses = Chart(
        name="Losses of the rows, in order, before and after",
        steps=(1, count),
        curves=[Curve(_in_order(rows["base_loss"]), "raw"), Curve(_in_order(rows["adapter_loss"]), "smooth")],
        label=lambda value: f"{value:.1f}",
        height=_LOSS_HEIGHT,
    )
    change = Chart(
        name="Change of each row's loss, in order",
        steps=(1, count),
        curves=[Curve(_in_order(changes), "line")],
        label=lambda value: f"{value:+.1f}",
        height=_CHANGE_HEIGHT,
        level=Level(0.0, "unchanged"),
    )
    return (
        "<section><h2>Losses</h2><figure>"
        "<figcaption>Nats per token of each row, lowest first: base pale, adapter solid.</figcaption>"
        f"{draw(losses)}</figure><figure>"
        "<figcaption>What the adapter changes in each row, most gained first.</figcaption>"
        f"{draw(change)}</figure></section>"
    )


def _in_order(values: Sequence[float]) -> list[Point]:
    return [(float(rank), float(value)) for rank, value in enumerate(sorted(values), start=1)]


def _extremes(rows: Rows) -> dict[str, list[int]]:
    """Indices of the rows whose loss fell and rose most."""
    change = [after - before for before, after in zip(rows["base_loss"], rows["adapter_loss"], strict=True)]
    order = sorted(range(len(change)), key=lambda index: change[index])
    return {
        "Most gained": [index for index in order[:_SHOWN] if change[index] < 0],
        "Most lost": [index for index in order[::-1][:_SHOWN] if change[index] > 0],
    }


def _changed(title: str, rows: Rows, indices: Sequence[int]) -> str:
    if not indices:
        return ""
    lines = [
        f"<tr><th>{escape(str(rows['place'][index]))}</th>"
        f"<td>{rows['base_loss'][index]:.4f} → {rows['adapter_loss'][index]:.4f}"
        f'<p class="words soft">{escape(_clipped(rows["text"][index]))}</p></td></tr>'
        for index in indices
    ]
    answered = [index for index in indices if rows.get("prompt") and rows["prompt"][index] is not None]
    samples = [
        Sample(*(rows[name][index] for name in ("prompt", "reference", "base_answer", "adapter_answer")))
        for index in answered
    ]
    return f"<section><h2>{title}</h2><table>{''.join(lines)}</table></section>{render_samples(samples)}"


def _clipped(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ..."
