"""The curves of report.html: the loss, and below it, sharing its steps, what explains its course.

Knows what each metric means and how it is labelled; drawing is `svg`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lora_cli.report import numbers
from lora_cli.report.curves import Point, finite, smooth, smoothing_window
from lora_cli.report.svg import Chart, Curve, Level, Mark, draw

_EPOCHS_MARKED = 40
_LOSS_HEIGHT = 340
_SMALL_HEIGHT = 104
_NUMBERS_HEIGHT = 12


@dataclass(frozen=True)
class PlotInput:
    training: Sequence[Mapping[str, Any]]
    evaluation: Sequence[Mapping[str, Any]]
    marks: Sequence[Mark]
    max_grad_norm: float | None
    estimated_bytes: int | None


def render_plots(plots: PlotInput) -> str:
    if not plots.training:
        return ""
    known = [line["step"] for line in (*plots.training, *plots.evaluation)]  # the base is evaluated at step 0
    steps = (min(known), max(known))
    charts = [chart for chart in _small_charts(plots, steps) if any(curve.points for curve in chart.curves)]
    if charts:
        charts[-1] = replace(charts[-1], numbered=True, height=charts[-1].height + _NUMBERS_HEIGHT)
    small = "".join(f"<figure><h3>{chart.name}</h3>{draw(chart)}</figure>" for chart in charts)
    return f"<section><h2>Loss</h2>{_loss_figure(plots, steps)}{small}</section>"


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return finite([(line["step"], line[key]) for line in lines if line.get(key) is not None])


def _loss_figure(plots: PlotInput, steps: tuple[int, int]) -> str:
    raw, valid = _points(plots.training, "loss"), _points(plots.evaluation, "eval_loss")
    window = smoothing_window(len(raw))
    smoothed = window > 1
    curves = [Curve(raw, "raw" if smoothed else "line")]
    if smoothed:
        curves.append(Curve(smooth(raw, window), "smooth"))
    chart = Chart(
        "training and validation loss",
        steps,
        curves,
        lambda value: f"{value:.3g}",
        _LOSS_HEIGHT,
        dots=valid,
        ringed=min(valid, key=lambda point: point[1]) if valid else None,
        marks=[*_epochs(plots.training), *plots.marks],
    )
    return f"<figure><figcaption>{_legend(plots, window)}</figcaption><output></output>{draw(chart)}</figure>"


def _legend(plots: PlotInput, window: int) -> str:
    text = "Nats per trained token. "
    if window > 1:
        text += f"Pale: the mean between two log lines. Solid: centred moving average over {window} of them. "
    else:
        text += "Line: the mean between two log lines. "
    if plots.evaluation:
        text += "Dots: validation, the best ringed. "
    kinds = {mark.kind for mark in plots.marks}
    names = {"checkpoint": "Triangles: checkpoints. ", "resume": "Solid upright: resumed. "}
    names["halving"] = "Orange upright: micro-batch halved. "
    if _epochs(plots.training):
        text += "Dotted upright: epochs. "
    return text + "".join(name for kind, name in names.items() if kind in kinds).rstrip()


def _epochs(training: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """Where each epoch but the last ends, read off between the log lines on either side."""
    marks = []
    for before, after in pairwise(training):
        for epoch in range(math.floor(before["epoch"]) + 1, math.floor(after["epoch"]) + 1):
            share = (epoch - before["epoch"]) / (after["epoch"] - before["epoch"])
            step = round(before["step"] + share * (after["step"] - before["step"]))
            if step < training[-1]["step"]:
                marks.append(Mark(step, "epoch", f"epoch {epoch} ends"))
    return marks if len(marks) <= _EPOCHS_MARKED else []


def _small_charts(plots: PlotInput, steps: tuple[int, int]) -> list[Chart]:
    def curve(key: str) -> list[Curve]:
        return [Curve(_points(plots.training, key), "line")]

    clip = None
    if plots.max_grad_norm is not None:
        clip = Level(plots.max_grad_norm, f"clipped above {plots.max_grad_norm:g}")
    estimate = None
    if plots.estimated_bytes:
        estimate = Level(plots.estimated_bytes / numbers.GIB, f"estimated {numbers.gib(plots.estimated_bytes)}")
    memory = [Curve([(x, y / numbers.GIB) for x, y in _points(plots.training, "peak_memory_bytes") if y], "line")]

    def chart(name: str, curves: list[Curve], label: Callable[[float], str], level: Level | None = None) -> Chart:
        return Chart(name, steps, curves, label, _SMALL_HEIGHT, level=level, from_zero=True, numbered=False)

    return [
        chart("learning rate", curve("learning_rate"), numbers.learning_rate),
        chart("gradient norm, before clipping", curve("grad_norm"), _plain, clip),
        chart("tokens per second", curve("tokens_per_second"), _thousands),
        chart("peak memory, GiB", memory, _plain, estimate),
    ]


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"
