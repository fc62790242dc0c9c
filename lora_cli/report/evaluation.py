"""The screens of `eval` and `generate`: base and adapter side by side, and the verdict.

Knows nothing about how the figures came about, and nothing about colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from lora_cli.report import numbers
from lora_cli.report.comparison import Evaluation, Generations, Measure, Output, RowChange
from lora_cli.report.layout import INDENT, labelled, page_width, printable, short_path, table, wrap

_NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "bits_per_byte": "bits per byte",
    "exact_match": "exact match",
    "normalised_match": "match, normalised",
    "ended_by_itself": "ended by itself",
}
"""The measures that are shown, in this order; all are in the JSON."""
_HEADER = ("", "base", "adapter", "difference", "95 % interval")


def render_evaluation(evaluation: Evaluation, width: int | None = None) -> str:
    """What `eval` shows."""
    width = width or page_width()
    found = {measure.name: measure for measure in evaluation.measures}
    rows = [_row(found[name], evaluation.loss) for name in _NAMES if name in found]
    lines = [*wrap(_head(evaluation), width, first=INDENT), "", *table(_HEADER, rows, width), ""]
    lines += labelled("rows", _rows(evaluation), width)
    lines += labelled("verdict", evaluation.verdict, width)
    if evaluation.demand.min_improvement is not None:
        asked = f"an improvement of {evaluation.demand.min_improvement:g} was asked"
        met = "and is met" if evaluation.meets_demand else "and is not met"
        lines += labelled("", f"{asked}, {met}", width)
    if evaluation.folder is not None:
        lines += labelled("wrote", short_path(evaluation.folder), width)
    return "\n".join(lines)


def _head(evaluation: Evaluation) -> str:
    rows = numbers.counted(evaluation.rows, "row")
    tokens = numbers.counted(evaluation.num_supervised_tokens, "scored token")
    answers = f", {numbers.counted(evaluation.answers, 'answer')} each" if evaluation.answers else ""
    data = short_path(evaluation.data) if "/" in evaluation.data else evaluation.data
    return f"{data}: {rows}, {tokens}{answers}, paired; base in {evaluation.precision}"


def _row(measure: Measure, loss: Measure) -> tuple[str, ...]:
    name = _NAMES[measure.name]
    base, adapter = (_number(value) for value in (measure.base, measure.adapter))
    if measure.name == "perplexity":  # as a ratio, which is what a difference of losses makes of it
        percent = [None if d is None else 100 * math.expm1(d) for d in (loss.difference, loss.low, loss.high)]
        difference, *bounds = ("" if value is None else f"{value:+.1f}" for value in percent)
        return name, base, adapter, f"{difference} %", _interval(bounds)
    bounds = ["" if bound is None else f"{bound:+.4f}" for bound in (measure.low, measure.high)]
    return name, base, adapter, f"{measure.difference:+.4f}", _interval(bounds)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _interval(bounds: Sequence[str]) -> str:
    return " .. ".join(bounds) if all(bounds) else "too few rows"


def _rows(evaluation: Evaluation) -> str:
    text = f"{evaluation.better:,} better, {evaluation.worse:,} worse"
    same = evaluation.rows - evaluation.better - evaluation.worse
    if same:
        text += f", {same:,} the same"
    if evaluation.better or evaluation.worse:
        text += f"; sign test p {_probability(evaluation.sign_test_p)}"
    for what, rows in (("most gained", evaluation.gained), ("most lost", evaluation.lost)):
        if rows:
            text += f"\n{what}: {', '.join(map(_changed, rows))}"
    return text


def _probability(p: float) -> str:
    return "below 0.0001" if p < 0.0001 else f"{p:.4f}"


def _changed(row: RowChange) -> str:
    return f"{short_path(row.place)} ({row.difference:+.2f})"


def render_outputs(generations: Generations, width: int | None = None) -> str:
    """What `generate` shows: each prompt, and under it what each model makes of it."""
    width = width or page_width()
    blocks = []
    for prompt, outputs in groupby(generations.outputs, key=lambda output: output.prompt):
        lines = wrap(prompt, width, first=INDENT)
        for output in outputs:
            lines += ["", f"{INDENT}{_who(output)}", *wrap(output.text, width, first=INDENT * 2)]
        blocks.append("\n".join(lines))
    return "\n\n\n".join(blocks)


def _who(output: Output) -> str:
    who = "base" if output.adapter is None else printable(short_path(output.adapter))
    return f"{who} (cut at the limit)" if output.stop_reason == "length" else who
