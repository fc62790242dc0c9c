"""The terminal: a live region below the lines that stay, drawn with Rich, and the colours.

Colour repeats what the words say and never carries it: labels are dim, `ok` is green, `!` yellow. With
NO_COLOR there is none, and no bold or dim either. Knows nothing about what an event means.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from lora_cli.report import numbers
from lora_cli.report.events import Evaluated, Logged, Saved, Stepped, SweepStepped, Working
from lora_cli.report.layout import INDENT, LABEL_WIDTH, printable
from lora_cli.report.progress import Line, Lines, Progress

_SECONDS_BETWEEN_FRAMES = 0.1
_MARKS = {"ok": "green", "!": "yellow", "no": "red", "▌": "green"}
_MARK = re.compile(r"  (ok|!|no|▌) +")
_LABEL = re.compile(r"[a-z]+ +")


def _rich_console(stream: TextIO) -> Console:
    # Markup is off because `[q_proj]` is a value, not a style. Whether this is a terminal the caller has
    # settled: Rich, left to itself, would also listen to FORCE_COLOR and the like.
    return Console(
        file=stream,
        force_terminal=True,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,
    )


def print_painted(text: str, stream: TextIO) -> None:
    """Prints a screen in colours, its lines as they are."""
    console = _rich_console(stream)
    for line in text.split("\n"):
        console.print(painted(line))


def painted(line: str) -> Text:
    """A line of a screen with its mark coloured and its label dimmed."""
    text = Text(line)
    mark = _MARK.match(line)
    if mark:
        # A line of trained tokens is coloured whole; elsewhere the mark alone.
        text.stylize(_MARKS[mark[1]], 0, len(line) if mark[1] == "▌" else mark.end())
    start = max(mark.end() if mark else 0, len(INDENT))
    if _LABEL.fullmatch(line[start : start + LABEL_WIDTH]):
        text.stylize("dim", start, start + LABEL_WIDTH)
    return text


class Frame:
    """What the live region shows right now, laid out anew for the width it's drawn at."""

    def __init__(self) -> None:
        self.working: Working | None = None
        self.progress: Lines = Progress()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.working is not None:
            yield Text(printable(INDENT + _status(self.working)), style="dim", no_wrap=True, overflow="ellipsis")
        else:
            for number, line in enumerate(self.progress.lines(options.max_width)):
                yield _drawn(line, gap=3 if number else 2)


def _status(event: Working) -> str:
    """`loading weights  120 of 291 tensors`"""
    if event.unit == "bytes":
        done = numbers.size(event.done)
        return f"{event.what}  {done}" + (f" of {numbers.size(event.total)}" if event.total else "")
    if event.total:
        return f"{event.what}  {event.done:,} of {event.total:,} {event.unit}".rstrip()
    return f"{event.what}  {event.done:,} {event.unit}".rstrip() if event.done else event.what


def _drawn(line: Line, gap: int) -> Text:
    text = Text(INDENT, no_wrap=True, overflow="ignore")
    for number, part in enumerate(line):
        if number:
            text.append(" " * gap)
        text.append(part.before, style="dim").append(part.number).append(part.after, style="dim")
    return text


class Terminal:
    """A live region below the lines that stay: a status while working, two lines while training.

    Frames are drawn as events come, at most ten a second; no thread draws in between.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = _rich_console(stream)
        self._frame = Frame()
        self._live: Live | None = None
        self._drawn_at = 0.0

    def say(self, text: str) -> None:
        # Rich puts these above the live region.
        for line in text.split("\n"):
            self._console.print(painted(line))

    def working(self, event: Working) -> None:
        starts = self._frame.working is None or self._frame.working.what != event.what
        self._frame.working = event
        self._draw(now=starts)

    def advance(self, progress: Lines, event: Stepped | Logged | Evaluated | Saved | SweepStepped) -> None:
        begins = self._frame.working is not None
        self._frame.working = None
        self._frame.progress = progress
        self._draw(now=begins or not isinstance(event, Stepped | SweepStepped) or event.step == event.total)

    def close(self) -> None:
        """The last state of the run stays on the screen; a status does not."""
        if self._live is not None:
            self._live.transient = self._frame.working is not None
            self._live.stop()
            self._live = None

    def _draw(self, *, now: bool) -> None:
        if self._live is None:
            # What libraries print to stdout is lifted above the region only where stdout is this terminal;
            # in a file it's wanted as it is.
            self._live = Live(
                self._frame, console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
            )
            self._live.start()
        if now or time.monotonic() - self._drawn_at >= _SECONDS_BETWEEN_FRAMES:
            self._live.refresh()
            self._drawn_at = time.monotonic()
