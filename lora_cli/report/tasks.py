"""What standard benchmarks found, as frozen values, and their screen.

Knows nothing about how a task was run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.report import numbers
from lora_cli.report.comparison import FEWEST_ROWS, Measure, Outcome
from lora_cli.report.layout import INDENT, labelled, page_width, short_path, table, wrap

_OUTCOMES: tuple[Outcome, ...] = ("better", "worse", "can't tell")


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task, of base and adapter."""

    task: str
    measure: Measure
    """Without an interval (NaN) where the figure is no mean over documents."""
    documents: int
    """0 for a group of tasks."""
    higher_is_better: bool

    @property
    def outcome(self) -> Outcome:
        """What the interval says."""
        low, high = self.measure.low, self.measure.high
        if self.documents < FEWEST_ROWS or not (low > 0 or high < 0):
            return "can't tell"
        return "better" if (low > 0) == self.higher_is_better else "worse"

    @property
    def name(self) -> str:
        return f"{self.task} {self.measure.name}"


@dataclass(frozen=True)
class TaskComparison:
    """One adapter against its base."""

    adapter: str
    precision: str
    figures: tuple[TaskFigure, ...]

    def count(self, outcome: Outcome) -> int:
        return sum(figure.outcome == outcome for figure in self.figures)

    @property
    def verdict(self) -> str:
        """Such as `of 3 figures: 1 better, 0 worse, 2 can't tell`."""
        counts = {outcome: self.count(outcome) for outcome in _OUTCOMES}
        figures = numbers.counted(len(self.figures), "figure")
        return f"of {figures}: " + ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())

    def as_json(self) -> dict[str, Any]:
        named = {figure.name: figure.measure for figure in self.figures}
        return {
            "adapter_folder": self.adapter,
            "precision": self.precision,
            "base": {name: _number(measure.base) for name, measure in named.items()},
            "adapter": {name: _number(measure.adapter) for name, measure in named.items()},
            "difference": {
                **{name: _number(measure.difference) for name, measure in named.items()},
                "intervals": {name: [_number(m.low), _number(m.high)] for name, m in named.items()},
            },
            "documents": {figure.name: figure.documents for figure in self.figures},
            "outcomes": {figure.name: figure.outcome for figure in self.figures},
            "verdict": self.verdict,
        }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class TaskEvaluation:
    """Base and adapters on the tasks of the harness."""

    target: str
    tasks: tuple[str, ...]
    comparison: TaskComparison
    others: tuple[TaskComparison, ...]
    num_fewshot: int | None
    limit: int | None
    chat: bool
    fail_if_worse: bool
    folder: Path | None

    @property
    def meets_demand(self) -> bool:
        return not (self.fail_if_worse and self.comparison.count("worse"))

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "tasks": list(self.tasks),
            **self.comparison.as_json(),
            "others": [one.as_json() for one in self.others],
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "apply_chat_template": self.chat,
            "demand": {"fail_if_worse": self.fail_if_worse, "met": self.meets_demand},
            "folder": None if self.folder is None else str(self.folder),
        }


def figure_cells(figure: TaskFigure) -> tuple[str, ...]:
    """A figure as it stands in a table: name, documents, base, adapter, difference, interval."""
    measure = figure.measure
    between = f"{measure.low:+.4f} .. {measure.high:+.4f}" if math.isfinite(measure.low) else "-"
    if 0 < figure.documents < FEWEST_ROWS:
        between = "too few"
    values = (f"{measure.base:.4f}", f"{measure.adapter:.4f}", f"{measure.difference:+.4f}")
    return (figure.name, f"{figure.documents:,}" if figure.documents else "", *values, between)


def render_tasks(evaluation: TaskEvaluation, width: int | None = None) -> str:
    """What `eval --tasks` shows."""
    width = width or page_width()
    lines = wrap(f"{', '.join(map(short_path, evaluation.tasks))}; {settings(evaluation)}", width, first=INDENT)
    for comparison in (evaluation.comparison, *evaluation.others):
        lines += ["", *wrap(f"{short_path(comparison.adapter)}, base in {comparison.precision}", width, first=INDENT)]
        header = ("", "n", "base", "adapter", "difference", "95 % interval")
        lines += ["", *table(header, [figure_cells(figure) for figure in comparison.figures], width, dispensable=1)]
        lines += ["", *labelled("verdict", comparison.verdict, width)]
    if evaluation.folder is not None:
        lines += labelled("wrote", short_path(evaluation.folder), width)
    return "\n".join(lines)


def settings(evaluation: TaskEvaluation) -> str:
    """How the tasks were put, in words."""
    shots = "shots as the tasks say" if evaluation.num_fewshot is None else f"{evaluation.num_fewshot} shots"
    parts: Sequence[str] = [shots, "chat template" if evaluation.chat else "no chat template"]
    if evaluation.limit is not None:
        parts = [*parts, f"the first {evaluation.limit:,} documents of each task"]
    return ", ".join(parts)
