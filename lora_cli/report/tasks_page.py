"""report.html of an evaluation on standard benchmarks: the verdict and the figures. All text is escaped."""

from __future__ import annotations

from pathlib import Path

from lora_cli.report.evaluation_page import STYLE, figures_table, head
from lora_cli.report.page import page
from lora_cli.report.tasks import TaskComparison, TaskEvaluation, figure_cells, settings


def render_tasks_page(evaluation: TaskEvaluation) -> str:
    """The whole page."""
    comparison = evaluation.comparison
    names = ", ".join(Path(task).stem for task in evaluation.tasks)
    outcome = "worse" if comparison.count("worse") else "better" if comparison.count("better") else "can't tell"
    line = f"{names} · {settings(evaluation)} · base in {comparison.precision}"
    top = head(evaluation.target, line, outcome, comparison.verdict, [], [])
    return page(evaluation.target, [top, *map(_figures, (comparison, *evaluation.others))], style=STYLE)


def _figures(comparison: TaskComparison) -> str:
    rows = []
    for figure in comparison.figures:
        name, documents, *rest = figure_cells(figure)
        rows.append(((f"{name} ({documents})" if documents else name, *rest), figure.outcome == "can't tell"))
    return figures_table("Base and adapter", f"{comparison.adapter}, base in {comparison.precision}", rows)
