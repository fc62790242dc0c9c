"""report.html of a sweep: which member is best and by how much, how all of them got there, what each setting did.

A pure function of what the sweep's folder holds; all text is escaped. Knows nothing about folders but that each
member's own page lies in one of its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

from lora_cli.report import assets, numbers, sweep_assets
from lora_cli.report.events import Standing, SweepSummary
from lora_cli.report.page import code, figure_tiles, page, warning_lines
from lora_cli.report.sections import render_config, render_environment
from lora_cli.report.sweep_charts import Course, Outcome, loss_figure, strip
from lora_cli.report.sweeping import loss_text, value_text, varied

_FEWEST_FOR_AN_EDGE = 3
"""Values of a setting from which on it says something that the best of them is the last."""


@dataclass(frozen=True)
class SweepReport:
    """What the page is made of."""

    name: str
    summary: SweepSummary
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    """The lines of each member's metrics.jsonl, by its name."""
    config_text: str
    """sweep.yaml."""
    environment: Mapping[str, Any]
    """environment.json of a member."""
    how: str
    """How members went through the base, in words."""
    command: str
    """What repeats the sweep."""
    warnings: Sequence[str] = ()


def render_sweep_page(report: SweepReport) -> str:
    """The whole page."""
    style = assets.STYLE + sweep_assets.STYLE
    sections = [_head(report), _board(report.summary), _losses(report), _settings(report.summary), _repeat(report)]
    return page(report.name, sections, style=style, script=sweep_assets.SCRIPT)


def _head(report: SweepReport) -> str:
    summary, environment = report.summary, report.environment
    steps = max((standing.steps for standing in summary.members), default=0)
    about = [
        f"{numbers.counted(len(summary.members), 'member')} on one frozen base, {report.how}",
        numbers.counted(steps, "step"),
        str(environment.get("started", ""))[:10],
        str(environment.get("device", "")),
    ]
    git = environment.get("git")
    if git:
        about.append(f"commit {git['commit'][:7]}" + (" with local changes" if git.get("dirty") else ""))
    line = escape(" · ".join(filter(None, about)))
    return (
        f'<header><h1>{escape(report.name)}</h1><p class="soft">{line}</p></header>'
        + figure_tiles(_figures(report))
        + warning_lines([*_edges(summary), *report.warnings])
    )


def _figures(report: SweepReport) -> list[tuple[str, str, str]]:
    summary = report.summary
    figures = []
    best, ranked = summary.members[0], [loss for s in summary.members if (loss := _ranked_loss(summary, s)) is not None]
    if ranked and not best.failed:
        course, by = numbers.loss(ranked[0]), "training loss"
        if summary.ranked_by == "eval_loss":
            base = next((line["eval_loss"] for line in report.metrics[best.name] if line.get("step") == 0), None)
            course, by = (f"{numbers.loss(base)} → {course}" if base is not None else course), "validation loss"
        figures.append((f"{by}, the best", course, best.name))
        figures.append(("best to worst", f"{numbers.loss(max(ranked) - ranked[0])}", "of those with a result"))
    early = sum(standing.stopped is not None for standing in summary.members)
    if early:
        figures.append(("ended early", f"{early:,}", f"of {numbers.counted(len(summary.members), 'member')}"))
    speed = f"{summary.tokens_per_second:,.0f} a second"
    figures.append(("tokens of all", numbers.counts(summary.num_tokens), speed))
    figures.append(("duration", numbers.duration(summary.train_seconds), "training alone"))
    if summary.peak_memory_bytes:
        figures.append(("peak memory", numbers.gib(summary.peak_memory_bytes), ""))
    return figures


def _edges(summary: SweepSummary) -> list[str]:
    """Settings whose best value is the last that was tried: there may be a better one beyond."""
    best = summary.members[0]
    found = []
    for key in () if best.failed else varied(summary):
        values = {standing.changes[key] for standing in summary.members if _is_number(standing.changes[key])}
        if len(values) < _FEWEST_FOR_AN_EDGE or best.changes[key] not in (min(values), max(values)):
            continue
        which, beyond = ("smallest", "smaller") if best.changes[key] == min(values) else ("largest", "larger")
        found.append(
            f"The best has the {which} {key} that was tried, {value_text(best.changes[key])}: try {beyond} ones."
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _board(summary: SweepSummary) -> str:
    """Best first; what differs, the losses, and why a member ended early."""
    keys, evaluated = varied(summary), summary.ranked_by == "eval_loss"
    first = _ranked_loss(summary, summary.members[0])
    names = ["", "member", *(key.rpartition(".")[2] for key in keys), *(["valid"] if evaluated else []), "train"]
    names += ["behind", "steps", "trainable"]
    rows = ""
    for place, standing in enumerate(summary.members, start=1):
        loss = _ranked_loss(summary, standing)
        behind = "" if place == 1 or loss is None or first is None else f"{loss - first:+.4f}"
        link = escape(standing.name)
        if not standing.failed:
            link = f'<a href="{escape(quote(standing.name))}/report.html">{link}</a>'
        cells = [
            str(place),
            link,
            *(escape(value_text(standing.changes[key])) for key in keys),
            *([loss_text(standing.eval_loss)] if evaluated else []),
            loss_text(standing.train_loss),
            behind,
            "failed" if standing.failed else f"{standing.steps:,}",
            numbers.counts(standing.trainable),
        ]
        css = "best" if place == 1 else "gone" if standing.stopped is not None else ""
        rows += f'<tr data-member="{place}" class="{css}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        if standing.stopped is not None:
            rows += f'<tr class="why"><td></td><td colspan="{len(cells) - 1}">{escape(standing.stopped)}</td></tr>'
    header = "".join(f"<th>{escape(name)}</th>" for name in names)
    by = "validation loss" if evaluated else "mean training loss of the last steps"
    note = f"Ranked by {by}, in nats per trained token; those that ended early come last."
    table = f'<div class="wide"><table class="board"><tr>{header}</tr>{rows}</table></div>'
    return f"<section><h2>Leaderboard</h2><figcaption>{note}</figcaption>{table}</section>"


def _losses(report: SweepReport) -> str:
    summary = report.summary
    courses = [
        Course(place, standing.name, report.metrics.get(standing.name, ()), standing.stopped is not None)
        for place, standing in enumerate(summary.members, start=1)
    ]
    figures = loss_figure(courses, "eval_loss", "validation", summary.rungs)
    figures += loss_figure(courses, "loss", "training", summary.rungs)
    if not figures:
        return ""
    note = "Nats per trained token; the numbers are places in the leaderboard. "
    note += "Dashed: ended early. " if any(course.early for course in courses) else ""
    note += "Dotted upright: halvings." if summary.rungs else ""
    return f"<section><h2>Losses</h2><figcaption>{note.rstrip()}</figcaption>{figures}</section>"


def _settings(summary: SweepSummary) -> str:
    """For each setting that differs, the loss that its values had."""
    strips = ""
    for key in varied(summary):
        values = list(dict.fromkeys(value_text(s.changes[key]) for s in _in_order(summary.members, key)))
        outcomes = [
            Outcome(place, s.name, values.index(value_text(s.changes[key])), loss, s.stopped is not None)
            for place, s in enumerate(summary.members, start=1)
            if not s.failed and (loss := _ranked_loss(summary, s)) is not None
        ]
        chart = strip(key, values, outcomes)
        strips += f"<figure><h3>{escape(key)}</h3>{chart}</figure>" if chart else ""
    if not strips:
        return ""
    note = "Each member's loss by its value; the line joins the best of each."
    note += " Hollow: ended early." if any(standing.stopped is not None for standing in summary.members) else ""
    return f'<section><h2>Settings</h2><figcaption>{note}</figcaption><div class="strips">{strips}</div></section>'


def _in_order(members: Sequence[Standing], key: str) -> list[Standing]:
    """By the setting's value where it is a number, else as the grid has it, which names begin with."""
    if all(_is_number(standing.changes[key]) for standing in members):
        return sorted(members, key=lambda standing: float(standing.changes[key]))
    return sorted(members, key=lambda standing: standing.name)


def _ranked_loss(summary: SweepSummary, standing: Standing) -> float | None:
    loss = standing.eval_loss if summary.ranked_by == "eval_loss" else standing.train_loss
    return loss if loss is not None and math.isfinite(loss) else None


def _repeat(report: SweepReport) -> str:
    return (
        f"<section><h2>Repeat</h2>{code('command', escape(report.command))}<h3>sweep.yaml</h3>"
        f"{code('config', render_config(report.config_text, frozenset()))}"
        f"{render_environment(report.environment)}</section>"
    )
