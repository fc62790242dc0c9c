"""Shows a run's events to a person: a live region on a terminal, plain lines everywhere else.

What is said while working goes to stderr; the closing summary, the command's answer, to stdout. Knows nothing
about training, and formats nothing itself: that's `screens` and `progress`.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Protocol, Self, TextIO

from lora_cli.plan import Plan
from lora_cli.report import numbers
from lora_cli.report.closing import render_summary
from lora_cli.report.events import (
    Dropped,
    Evaluated,
    Event,
    Finished,
    Logged,
    Measured,
    Planned,
    Resumed,
    Saved,
    Stepped,
    Stopped,
    SweepFinished,
    SweepPlanned,
    SweepStepped,
    Warned,
    Working,
)
from lora_cli.report.layout import columns, labelled, page_width, printable, short_path, warning
from lora_cli.report.progress import Lines, Progress, logged_line
from lora_cli.report.screens import render_plan
from lora_cli.report.sweeping import SweepProgress, render_leaderboard, render_sweep_plan, sweep_line

Advance = Stepped | Logged | Evaluated | Saved | SweepStepped


class Surface(Protocol):
    """Where the screens of a run go while it works."""

    def say(self, text: str) -> None:
        """Lines that stay."""

    def working(self, event: Working) -> None: ...

    def advance(self, progress: Lines, event: Advance) -> None:
        """`progress` has just recorded `event`."""

    def close(self) -> None: ...


class Log:
    """A pipe, a file, or a terminal that can't move its cursor: lines of text without escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._working_on = ""

    def say(self, text: str) -> None:
        write(text, self._stream)

    def working(self, event: Working) -> None:
        # Reported often, for the sake of a bar; a log needs it once.
        if event.what != self._working_on:
            self._working_on = event.what
            self.say(printable(f"  {event.what}"))

    def advance(self, progress: Lines, event: Advance) -> None:
        match event:
            case Logged():
                self.say(logged_line(event, columns()))
            case Evaluated():
                best = " best" if event.best else ""
                self.say(f"valid={numbers.loss(event.eval_loss)} step={event.step}{best}")
            case Saved():
                self.say(f"saved={printable(short_path(event.path))} step={event.step}")
            case SweepStepped():
                if event.logged:
                    self.say(printable(sweep_line(event)))
            case Stepped():
                pass

    def close(self) -> None:
        pass


class Console:
    """Shows events as they come.

    With `quiet_stdout` the closing summary goes to stderr, too: stdout is then free for JSON.
    """

    def __init__(self, quiet_stdout: bool = False) -> None:
        self._answers = sys.stderr if quiet_stdout else sys.stdout
        self._surface: Surface = _surface(sys.stderr)
        self._progress = Progress()
        self._sweep = SweepProgress()
        self._plan: Plan | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._surface.close()

    def emit(self, event: Event) -> None:
        width = page_width()
        match event:
            case Working():
                self._surface.working(event)
            case Planned(plan=plan):
                self._plan = plan
                self._surface.say(f"\n{render_plan(plan, width)}\n")
            case Warned(text=text):
                self._surface.say("\n".join(warning(text, width)))
            case Measured(seconds=seconds):
                text = f"about {numbers.duration(seconds)} to go, evaluations left out"
                self._surface.say("\n".join(labelled("time", text, width)))
            case Resumed(step=step, checkpoint=checkpoint):
                self._progress.resume(step)
                text = f"after step {step:,}, from {short_path(checkpoint)}"
                self._surface.say("\n".join(labelled("resumed", text, width)))
            case Stopped(step=step, why=why):
                self._surface.say("\n".join(labelled("stopped", f"at step {step:,}: {why}", width)))
            case Stepped() | Logged() | Evaluated() | Saved():
                self._progress.record(event)
                self._surface.advance(self._progress, event)
            case SweepPlanned():
                self._surface.say(f"\n{render_sweep_plan(event, width)}\n")
            case SweepStepped():
                self._sweep.last = event
                self._surface.advance(self._sweep, event)
            case Dropped(member=member, step=step, why=why):
                self._surface.say("\n".join(labelled("dropped", f"{member} at step {step:,}: {why}", width)))
            case SweepFinished(summary=ranking):
                self._surface.close()
                show(f"\n{render_leaderboard(ranking, width)}\n", self._answers)
            case Finished(summary=summary):
                self._surface.close()
                show(f"\n{render_summary(summary, self._plan, width)}\n", self._answers)


def show(text: str, stream: TextIO | None = None) -> None:
    """Prints a screen to stdout, or to `stream`, painted where that is a terminal that takes colours."""
    stream = stream or sys.stdout
    if is_terminal(stream) and not os.environ.get("NO_COLOR"):
        from lora_cli.report.live import print_painted

        print_painted(text, stream)
    else:
        write(text, stream)


def write(text: str, stream: TextIO) -> None:
    """Prints `text`; characters that the stream's encoding lacks are spelled out instead of raising."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` can show blocks and move its cursor."""
    able = os.environ.get("TERM", "") not in ("dumb", "unknown")
    return able and stream.isatty() and (stream.encoding or "").lower().replace("-", "") == "utf8"


def _surface(stream: TextIO) -> Surface:
    if is_terminal(stream):
        from lora_cli.report.live import Terminal

        return Terminal(stream)
    return Log(stream)
