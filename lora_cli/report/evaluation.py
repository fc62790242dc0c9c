"""The screens of `eval` and `generate`: base and adapter side by side, and the verdict.

Knows nothing about how the figures came about, and nothing about colour.
"""

from __future__ import annotations

import math
from itertools import groupby

from rich.cells import cell_len, set_cell_size

from lora_cli.report import numbers
from lora_cli.report.comparison import FEWEST_ROWS, Comparison, Evaluation, Generations, Measure, Output, RowChange
from lora_cli.report.layout import INDENT, labelled, page_width, printable, short_path, table, wrap

_NAMES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "row_loss": "loss, mean of rows",
    "token_accuracy": "token accuracy",
    "bits_per_byte": "bits per byte",
    "choice_accuracy": "choice accuracy",
    "choice_probability": "choice probability",
    "exact_match": "exact match",
    "normalised_match": "match, normalised",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "valid_json": "valid JSON",
    "matching_fields": "JSON fields",
    "pattern_match": "pattern match",
    "ended_by_itself": "ended by itself",
    "answer_tokens": "answer tokens",
}
"""The measures, in the order in which they are shown; all are in the JSON."""
_PAGE_ALONE = frozenset({"row_loss"})
_MOST_GROUPS, _GROUP_CELLS = 12, 24
_HEADER = ("", "base", "adapter", "difference", "95 % interval")


def render_evaluation(evaluation: Evaluation, width: int | None = None) -> str:
    """What `eval` shows."""
    width = width or page_width()
    lines = wrap(_head(evaluation), width, first=INDENT)
    for comparison in (evaluation.comparison, *evaluation.others):
        if evaluation.others:
            title = f"{short_path(comparison.adapter)}, base in {comparison.precision}"
            lines += ["", *wrap(title, width, first=INDENT)]
        lines += ["", *_comparison(comparison, evaluation.rows, width)]
    if evaluation.demand.min_improvement is not None:
        met = "is met" if evaluation.meets_demand else "is not met"
        text = f"{evaluation.demand.min_improvement:g} nats of improvement were asked, which {met}"
        lines += labelled("", text, width)
    if evaluation.folder is not None:
        lines += labelled("wrote", short_path(evaluation.folder), width)
    return "\n".join(lines)


def _head(evaluation: Evaluation) -> str:
    rows = numbers.counted(evaluation.rows, "row")
    tokens = numbers.counted(evaluation.num_supervised_tokens, "scored token")
    answers = f", {numbers.counted(evaluation.answers, 'answer')} each" if evaluation.answers else ""
    data = short_path(evaluation.data) if "/" in evaluation.data else evaluation.data
    base = "" if evaluation.others else f"; base in {evaluation.comparison.precision}"
    kept = "; the base's part is kept from before" if evaluation.base_kept else ""
    return f"{data}: {rows}, {tokens}{answers}, paired{base}{kept}"


def _comparison(comparison: Comparison, count: int, width: int) -> list[str]:
    found = {measure.name: measure for measure in comparison.measures}
    shown = [found[name] for name in _NAMES if name in found and name not in _PAGE_ALONE]
    rows = [measure_cells(measure, comparison.loss) for measure in shown]
    if count < FEWEST_ROWS:
        rows = [(*row[:-1], "too few rows") for row in rows]
    return [
        *table(_HEADER, rows, width),
        *_groups(comparison, width),
        "",
        *labelled("rows", _rows(comparison, count), width),
        *labelled("verdict", comparison.verdict, width),
        *(labelled("", versus(comparison.versus), width) if comparison.versus is not None else ()),
    ]


def versus(loss: Measure) -> str:
    """One adapter against another, in words."""
    text = f"against the first adapter: loss {loss.difference:+.4f}"
    return f"{text}, 95 % interval {loss.low:+.4f} to {loss.high:+.4f}"


def _groups(comparison: Comparison, width: int) -> list[str]:
    """The loss in each group; where there are many, the largest."""
    groups = comparison.groups[:_MOST_GROUPS]
    if not groups:
        return []
    rows = []
    for group in groups:
        _, *cells = measure_cells(group.loss, group.loss)
        if group.rows < FEWEST_ROWS:
            cells[-1] = "too few rows"
        rows.append((_shortened(group.name), f"{group.rows:,}", *cells))
    lines = ["", *table(("loss by group", "rows", *_HEADER[1:]), rows, width, dispensable=3)]
    left = len(comparison.groups) - len(groups)
    return [*lines, *wrap(f"and {numbers.counted(left, 'smaller group')}", width, first=INDENT)] if left else lines


def _shortened(name: str) -> str:
    return name if cell_len(name) <= _GROUP_CELLS else f"{set_cell_size(name, _GROUP_CELLS - 3).rstrip()}..."


def measure_name(name: str) -> str:
    """How a measure is called."""
    return _NAMES.get(name, name.replace("_", " "))


def measure_cells(measure: Measure, loss: Measure) -> tuple[str, ...]:
    """A measure as it stands in a table: name, base, adapter, difference, interval."""
    name = measure_name(measure.name)
    base, adapter = (_number(value) for value in (measure.base, measure.adapter))
    differences, digits, unit = [measure.difference, measure.low, measure.high], 4, ""
    if measure.name == "perplexity":  # as a ratio, which is what a difference of losses makes of it
        differences = [_percent(value) for value in (loss.difference, loss.low, loss.high)]
        digits, unit = 1, " %"
    elif measure.name == "answer_tokens":
        base, adapter = (f"{value:,.1f}" for value in (measure.base, measure.adapter))
        digits = 1
    difference, low, high = (_signed(value, digits) for value in differences)
    return name, base, adapter, f"{difference}{unit}", f"{low} .. {high}"


def _signed(value: float, digits: int) -> str:
    """With its sign; what is nothing at all, and not merely little, has neither sign nor digits."""
    return f"{value:+,.{digits}f}" if value != 0 else "0"


def _percent(difference: float) -> float:
    """What a difference of losses does to the perplexity."""
    return 100 * math.expm1(min(difference, 700.0))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _rows(comparison: Comparison, count: int) -> str:
    text = f"{comparison.better:,} better, {comparison.worse:,} worse"
    same = count - comparison.better - comparison.worse
    if same:
        text += f", {same:,} the same"
    if comparison.better or comparison.worse:
        text += f"; sign test p {_probability(comparison.sign_test_p)}"
    for what, rows in (("most gained", comparison.gained), ("most lost", comparison.lost)):
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
