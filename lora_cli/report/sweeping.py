"""The screens of `sweep`, as text: what will be trained, how far it is, and the leaderboard."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.report import numbers
from lora_cli.report.events import Standing, SweepPlanned, SweepStepped, SweepSummary
from lora_cli.report.layout import (
    INDENT,
    LABEL_WIDTH,
    command,
    labelled,
    page_width,
    short_path,
    table,
    warning,
)
from lora_cli.report.progress import Line, Part, bar, fitting
from lora_cli.report.screens import base_and_data, engine_words, plan_warnings


def render_sweep_plan(planned: SweepPlanned, width: int | None = None) -> str:
    """What `sweep` shows before the first step."""
    width = width or page_width()
    rows = base_and_data(planned.plan)
    longest = max(map(len, planned.grid))
    values = [f"{key:<{longest}}  {', '.join(value_text(v) for v in found)}" for key, found in planned.grid.items()]
    rows.append(("grid", "\n".join(values)))
    rows.append(("members", f"{len(planned.members)} on one frozen base; {_between(planned.trainable)} trainable each"))
    rows.append(("steps", f"{_between(planned.steps)} each, members {how_they_go(planned.in_turn)}"))
    if planned.halving is not None:
        rows.append(("halving", planned.halving))
    rows.append(("engine", engine_words(planned.plan.engine)))
    rows.append(("writes", f"{short_path(planned.output_dir)}, a run folder for each member"))
    lines = [line for label, text in rows for line in labelled(label, text, width)]
    warnings = [line for text in plan_warnings(planned.plan) for line in warning(text, width)]
    return "\n".join([*lines, "", *warnings] if warnings else lines)


def render_leaderboard(summary: SweepSummary, width: int | None = None) -> str:
    """What `sweep` shows at the end: best first."""
    width = width or page_width()
    keys = varied(summary)
    evaluated = summary.ranked_by == "eval_loss"
    header = ["", *(key.rpartition(".")[2] for key in keys), *(["valid"] if evaluated else []), "train", "steps"]
    header.append("trainable")
    rows = [
        [
            f"{place:>2}",
            *(value_text(standing.changes[key]) for key in keys),
            *([loss_text(standing.eval_loss)] if evaluated else []),
            loss_text(standing.train_loss),
            _steps(standing),
            numbers.counts(standing.trainable),
        ]
        for place, standing in enumerate(summary.members, start=1)
    ]
    lines = [*table(header, rows, width, dispensable=len(header) - 1), ""]
    lines += [line for label, text in _figures(summary) for line in labelled(label, text, width)]
    best = summary.members[0]
    label = "next"
    for words in () if best.failed else _next_commands(summary, best):
        lines += command(words, width, first=f"{INDENT}{label:<{LABEL_WIDTH}}")
        label = ""
    return "\n".join(lines)


def how_they_go(in_turn: bool) -> str:
    """How members go through the base."""
    return "in turn, each as in a run of its own" if in_turn else "side by side in the same rows"


def varied(summary: SweepSummary) -> list[str]:
    """The settings in which members differ."""
    keys = dict.fromkeys(key for standing in summary.members for key in standing.changes)
    return [key for key in keys if len({value_text(standing.changes[key]) for standing in summary.members}) > 1]


def _figures(summary: SweepSummary) -> list[tuple[str, str]]:
    by = "validation loss" if summary.ranked_by == "eval_loss" else "mean training loss of the last steps"
    time = f"{numbers.counted(len(summary.members), 'member')} in {numbers.duration(summary.train_seconds)}"
    rows = [
        ("done", f"{time}, {summary.tokens_per_second:,.0f} tok/s over all; ranked by {by}"),
        ("memory", f"peak {numbers.gib(summary.peak_memory_bytes)}"),
    ]
    ended = [standing for standing in summary.members if standing.stopped is not None]
    if ended:
        rows.append(("stopped", "\n".join(f"{standing.name}: {standing.stopped}" for standing in ended)))
    return rows


def _next_commands(summary: SweepSummary, best: Standing) -> list[list[str]]:
    run = short_path(best.output_dir)
    return [["lora", "eval", run], ["lora", "merge", run, "--output", f"merged/{best.name}"]]


@dataclass
class SweepProgress:
    """How far a sweep has come: the two lines of the live region, and the plain line of a log."""

    last: SweepStepped | None = None

    def lines(self, width: int) -> list[Line]:
        """The live region; empty before the first step."""
        step = self.last
        if step is None:
            return []
        place = Part("", f"{step.step:,}/{step.total:,}")
        members = Part("", f"{step.active} of {step.members}", " members")
        gone = Part("", numbers.clock(step.seconds_gone), " gone")
        left = Part("", numbers.clock(step.seconds_left), " left")
        first = fitting([place, members, left, gone], width - len(INDENT) - 10, gap=2)
        room = width - len(INDENT) - sum(part.width + 2 for part in first)
        ordered = [part for part in (place, members, gone, left) if part in first]
        best = Part("best ", loss_text(step.best_loss), f" {step.best}")
        worst = Part("worst ", loss_text(step.worst_loss))
        speed = Part("", f"{step.tokens_per_second:,.0f}", " tok/s")
        memory = Part("", numbers.gib(step.peak_memory_bytes))
        figures = fitting([best, worst, speed, memory], width - len(INDENT), gap=3)
        return [[bar(step.step / step.total, min(28, room)), *ordered], figures]


def sweep_line(step: SweepStepped) -> str:
    """A round as one plain line."""
    return (
        f"step={step.step}/{step.total} members={step.active}/{step.members} best={loss_text(step.best_loss)} "
        f"({step.best}) worst={loss_text(step.worst_loss)} tok/s={step.tokens_per_second:.0f} "
        f"left={numbers.clock(step.seconds_left)}"
    )


def _between(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return numbers.counts(low) if low == high else f"{numbers.counts(low)} to {numbers.counts(high)}"


def loss_text(loss: float | None) -> str:
    """A loss, or a dash where there is none."""
    return "-" if loss is None or not math.isfinite(loss) else numbers.loss(loss)


def _steps(standing: Standing) -> str:
    return "failed" if standing.failed else f"{standing.steps:,}{'' if standing.stopped is None else ' *'}"


def value_text(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, float):
        return numbers.learning_rate(value) if value < 1e-2 else f"{value:g}"
    if isinstance(value, str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else json.dumps(value)
