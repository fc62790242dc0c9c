"""report.html: one self-contained page: did the run work, can it be trusted, can it be repeated?

A pure function of what the run folder holds: same input, same bytes. Nothing is loaded from anywhere, all
text that comes from data or a model is escaped, and a content security policy says so again. Knows nothing
about folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lora_cli.report import numbers
from lora_cli.report.assets import SCRIPT, STYLE
from lora_cli.report.curves import thin
from lora_cli.report.page import code, figure_tiles, page, warning_lines
from lora_cli.report.plots import PlotInput, render_plots
from lora_cli.report.sections import (
    MaskedExample,
    Sample,
    render_config,
    render_data,
    render_environment,
    render_samples,
)
from lora_cli.report.svg import Mark

_LINES_EMBEDDED = 1000


@dataclass(frozen=True)
class ReportInput:
    """What the page is made of. What is empty or None leaves no trace on the page."""

    name: str
    config_text: str
    """The resolved config.yaml."""
    environment: Mapping[str, Any]
    """environment.json."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl."""
    summary: Mapping[str, Any] | None = None
    """summary.json; None while the run isn't over."""
    samples: Sequence[Sample] = ()
    command: str = ""
    """What repeats the run."""
    warnings: Sequence[str] = ()
    marks: Sequence[Mark] = ()
    """Checkpoints, resumes, halvings. Epochs are read from the metrics."""
    data: Mapping[str, Any] | None = None
    """The account of the training rows: the fields of `DataAccount`."""
    max_length: int | None = None
    """At most so many tokens of an example are used."""
    example: MaskedExample | None = None
    """One training example, to see what the loss sees."""
    non_defaults: frozenset[str] = frozenset()
    """Dotted keys of the settings that aren't at their default."""
    max_grad_norm: float | None = None
    estimated_bytes: int | None = None
    """What the run was estimated to need, measured as `peak_memory_bytes` is."""


def render_report(report: ReportInput) -> str:
    training = [line for line in report.metrics if "loss" in line]
    evaluation = [line for line in report.metrics if "eval_loss" in line]
    plots = PlotInput(training, evaluation, report.marks, report.max_grad_norm, report.estimated_bytes)
    body = [
        _head(report, training, evaluation),
        render_plots(plots),
        render_samples(report.samples),
        render_data(report.data, report.max_length, report.example),
        _repeat(report),
    ]
    return page(report.name, body, style=STYLE, script=SCRIPT, metrics=_embedded(training, evaluation))


Lines = Sequence[Mapping[str, Any]]


def _head(report: ReportInput, training: Lines, evaluation: Lines) -> str:
    about = [_status(report.summary, training), str(report.environment.get("started", ""))[:10]]
    about.append(str(report.environment.get("device", "")))
    git = report.environment.get("git")
    if git:
        about.append(f"commit {git['commit'][:7]}" + (" with local changes" if git.get("dirty") else ""))
    resumes = sum(mark.kind == "resume" for mark in report.marks)
    if resumes:
        about.insert(1, "resumed once" if resumes == 1 else f"resumed {resumes} times")
    line = escape(" · ".join(filter(None, about)))
    return (
        f'<header><h1>{escape(report.name)}</h1><p class="soft">{line}</p></header>'
        + figure_tiles(_figures(report, training, evaluation))
        + warning_lines(report.warnings)
    )


def _status(summary: Mapping[str, Any] | None, training: Lines) -> str:
    if summary is None:
        return f"not finished, {numbers.counted(training[-1]['step'] if training else 0, 'step')} so far"
    steps = numbers.counted(summary["steps"], "step")
    return f"stopped after {steps}: {summary['stopped']}" if summary.get("stopped") else f"finished, {steps}"


def _figures(report: ReportInput, training: Lines, evaluation: Lines) -> list[tuple[str, str, str]]:
    """Name, number, and what stands beside it."""
    figures = []
    losses = [line for line in evaluation if line["eval_loss"] is not None]
    if losses:
        first, last = losses[0], losses[-1]
        best = min(losses, key=lambda line: line["eval_loss"])
        course = " → ".join(numbers.loss(line["eval_loss"]) for line in (first, best, last))
        beside = f"at steps {first['step']:,}, {best['step']:,}, {last['step']:,}"
        figures.append(("validation loss: first, best, last", course, beside))
    summary = report.summary
    if summary is None:
        return figures
    if not losses and summary["final_loss"] is not None:
        course = " → ".join(numbers.loss(summary[key]) for key in ("first_loss", "final_loss"))
        figures.append(
            (
                "training loss",
                course,
                f"means of first and last {numbers.counted(summary['loss_span'], 'step')}",
            )
        )
    figures.append(("tokens trained", numbers.counts(summary["num_supervised_tokens"]), _of(summary["num_tokens"])))
    figures.append(("duration", numbers.duration(summary["train_seconds"]), "training alone"))
    figures.append(("tokens a second", f"{summary['tokens_per_second']:,.0f}", "trained or not"))
    if summary["peak_memory_bytes"]:
        figures.append(("peak memory", numbers.gib(summary["peak_memory_bytes"]), _against(report)))
    return figures


def _of(num_tokens: int) -> str:
    return f"of {numbers.counts(num_tokens)}"


def _against(report: ReportInput) -> str:
    if report.summary is None or not report.estimated_bytes:
        return ""
    off = 100 * (report.summary["peak_memory_bytes"] / report.estimated_bytes - 1)
    return f"{numbers.percent(abs(off))} {'over' if off > 0 else 'under'} the estimate"


def _repeat(report: ReportInput) -> str:
    note = "<figcaption>Settings that differ from their defaults are bold.</figcaption>" if report.non_defaults else ""
    return (
        "<section><h2>Repeat</h2>"
        + (code("command", escape(report.command)) if report.command else "")
        + "<h3>config.yaml</h3>"
        + code("config", render_config(report.config_text, report.non_defaults))
        + note
        + render_environment(report.environment)
        + "</section>"
    )


_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    "num_supervised_tokens",
    "tokens_per_second",
    "peak_memory_bytes",
)


def _embedded(training: Lines, evaluation: Lines) -> str:
    """The metrics by column, thinned like the curves. Numbers alone, so nothing in it needs escaping."""
    order = [(float(index), line["loss"] or 0.0) for index, line in enumerate(training)]
    lines = [training[int(index)] for index, _ in thin(order, _LINES_EMBEDDED)]
    steps = [(float(line["step"]), line["eval_loss"] or 0.0) for line in evaluation]
    value = {
        "lines": len(training),
        "training": {key: [_short(line.get(key)) for line in lines] for key in _COLUMNS},
        "evaluation": [{"step": int(step), "eval_loss": _short(loss)} for step, loss in thin(steps, _LINES_EMBEDDED)],
    }
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _short(value: float | None) -> float | None:
    """Six digits are more than a curve shows."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
