"""How far a run has come: the two lines of the live region, and the plain line of a log.

Every loss shown here is one that stands in metrics.jsonl, a mean over the steps since the line before it; the
step's own loss shows only until the first such line. What doesn't fit a narrow terminal is left out whole,
the least needed first. Knows nothing about Rich.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.cells import cell_len

from lora_cli.report import numbers
from lora_cli.report.curves import sparkline
from lora_cli.report.events import Evaluated, Logged, Saved, Stepped
from lora_cli.report.layout import INDENT

_SPARK_CELLS = 12
_BAR_CELLS = 28


@dataclass(frozen=True)
class Part:
    """One figure of a line: the number, and the words around it, which are shown dimmed."""

    before: str
    number: str
    after: str = ""

    @property
    def width(self) -> int:
        return cell_len(self.before + self.number + self.after)


Line = list[Part]


class Lines(Protocol):
    """What the live region shows."""

    def lines(self, width: int) -> list[Line]:
        """As many lines as there is something to say, none wider than `width`."""


@dataclass
class Progress:
    """What is known of a run that is under way."""

    step: Stepped | None = None
    losses: list[float] = field(default_factory=list)
    span: int = 0
    """Over how many steps the last of `losses` was taken."""
    logged_step: int = 0
    validation: Evaluated | None = None
    saved: Saved | None = None

    def record(self, event: Stepped | Logged | Evaluated | Saved) -> None:
        match event:
            case Stepped():
                self.step = event
            case Logged(metrics=metrics):
                self.losses.append(metrics["loss"])
                self.span = metrics["step"] - self.logged_step
                self.logged_step = metrics["step"]
            case Evaluated():
                self.validation = event
            case Saved():
                self.saved = event

    def resume(self, step: int) -> None:
        """The run goes on after `step`, so the first line spans the steps since then."""
        self.logged_step = step

    def lines(self, width: int) -> list[Line]:
        """The live region; empty before the first step."""
        if self.step is None:
            return []
        return [self._position(self.step, width), self._figures(self.step, width)]

    def _position(self, step: Stepped, width: int) -> Line:
        place = Part("", f"{step.step:,}/{step.total:,}")
        share = Part("", numbers.percent(100 * step.step / step.total, 0))
        epoch = Part("epoch ", f"{step.epoch:.2f}")
        gone = Part("", numbers.clock(step.seconds_gone), " gone")
        left = Part("", numbers.clock(step.seconds_left), " left")
        smallest_bar = 8
        kept = fitting([place, left, share, epoch, gone], width - len(INDENT) - smallest_bar - 2, gap=2)
        shown = [part for part in (place, share, epoch, gone, left) if part in kept]
        room = width - len(INDENT) - sum(part.width + 2 for part in shown)
        return [bar(step.step / step.total, min(_BAR_CELLS, room)), *shown]

    def _figures(self, step: Stepped, width: int) -> Line:
        loss, trend = self._loss(step)
        rate = Part("lr ", numbers.learning_rate(step.learning_rate))
        gradient = Part("grad ", numbers.gradient_norm(step.grad_norm))
        speed = Part("", f"{step.tokens_per_second:,.0f}", " tok/s")
        memory = Part("", numbers.gib(step.peak_memory_bytes)) if step.peak_memory_bytes else None
        valid = saved = None
        if self.validation is not None:
            valid = Part("valid ", numbers.loss(self.validation.eval_loss), f" @{self.validation.step:,}")
        if self.saved is not None:
            saved = Part("saved ", f"@{self.saved.step:,}")
        needed_first = [loss, valid, trend, speed, rate, memory, gradient, saved]
        kept = fitting([part for part in needed_first if part is not None], width - len(INDENT), gap=3)
        return [part for part in (loss, trend, rate, gradient, speed, memory, valid, saved) if part in kept]

    def _loss(self, step: Stepped) -> tuple[Part, Part | None]:
        """The loss and, once there is one, its course."""
        if not self.losses:
            return Part("loss ", numbers.loss(step.loss), f" @{step.step:,}"), None
        span = f"{self.span:,}-step " if self.span > 1 else ""
        return Part(f"{span}loss ", numbers.loss(self.losses[-1])), Part("", sparkline(self.losses, _SPARK_CELLS))


def bar(share: float, cells: int) -> Part:
    """A bar of so many cells, filled to its share."""
    filled = round(share * cells)
    return Part("", "█" * filled, "░" * (cells - filled))


def fitting(parts: Sequence[Part], width: int, *, gap: int) -> list[Part]:
    """The longest beginning of `parts` that fits, `gap` cells between two of them."""
    used = -gap
    for number, part in enumerate(parts):
        used += gap + part.width
        if used > width:
            return list(parts[:number])
    return list(parts)


def logged_line(event: Logged, width: int | None) -> str:
    """`step=1240/2340 epoch=1.59 loss=1.0832 ... left=51:07`, one line whatever the width."""
    metrics = event.metrics
    fields = [
        f"step={metrics['step']}/{event.total}",
        f"epoch={metrics['epoch']:.2f}",
        f"loss={numbers.loss(metrics['loss'])}",
        f"lr={numbers.learning_rate(metrics['learning_rate'])}",
        f"grad={numbers.gradient_norm(metrics['grad_norm'])}",
        f"tok/s={metrics['tokens_per_second']:.0f}",
    ]
    if metrics["peak_memory_bytes"]:
        fields.append(f"peak={metrics['peak_memory_bytes'] / numbers.GIB:.1f}GiB")
    fields.append(f"left={numbers.clock(event.seconds_left)}")
    # What is left out stands in metrics.jsonl.
    while width is not None and len(" ".join(fields)) > width:
        del fields[-2]
    return " ".join(fields)
