"""What happens when a command fails: one clear message on stderr, and the exit code that says whose turn
it is.

The only place that turns exceptions into exit codes. Knows the tree in `errors`, and nothing about any
command.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import get_terminal_size
from types import FrameType
from typing import NoReturn

from lora_cli.errors import ConfigError, Interrupted, LoraError, Problem

_PATIENCE_SECONDS = 5.0
INTERRUPTED = 130
BROKEN_PIPE = 141

_RED, _YELLOW, _PLAIN = "31;1", "33", "0"


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Run a command; what a user can cause becomes a message and `SystemExit`."""
    _leave_on_sigterm()
    try:
        yield
        sys.stdout.flush()
    except LoraError as error:
        if debug:
            traceback.print_exc()
        if not _is_first_process():
            if isinstance(error, Interrupted):  # all of them were, and all agree
                sys.exit(error.exit_code)
            time.sleep(_PATIENCE_SECONDS)
        print(as_text(error, colour=_colour()), end="", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _leave_on_sigterm() -> None:
    """SIGTERM unwinds as Ctrl-C does, where nobody else listens: temporary files go, and the cursor comes back."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _is_first_process() -> bool:
    """Under torchrun a mistake of the user's fails every process alike; once is enough to be told.

    The first one's end makes torchrun end the others. One that is still there a while later has failed alone, and
    speaks.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


def report_bug() -> NoReturn:
    """The exception being handled is none of ours, so the mistake is."""
    traceback.print_exc()
    print("\nThis is a bug in lora. Please report it, with the lines above.", file=sys.stderr)
    sys.exit(1)


def as_text(error: LoraError, *, colour: bool = False) -> str:
    """The message as it is printed, with the offending lines of a config."""
    lines = [f"{_painted('error:', _RED, colour)} {_clean(error.message)}"]
    if isinstance(error, ConfigError):
        for problem in error.problems:
            lines += ["", *_problem_lines(problem, colour)]
        lines += ["", "Nothing was loaded or written."]
    elif error.remedy is not None:
        lines += [f"  {_clean(line)}" for line in error.remedy.splitlines()]
    return "\n".join(lines) + "\n"


def _problem_lines(problem: Problem, colour: bool) -> list[str]:
    place = problem.place
    where = str(place) if place is not None else "--set"
    head = "  ".join(part for part in (where, problem.key, problem.message) if part)
    lines = [f"  {_clean(head)}"]
    if place is None or not place.text.strip():
        return lines + _wrapped(problem.hint, " " * 4, " " * 4)
    number = str(place.line)
    gutter = f"    {' ' * len(number)} | "
    lines.append(f"    {number} | {_clean(place.text)}")
    before, marked = place.text[: place.column - 1], place.text[place.column - 1 :][: place.length]
    indent, carets = " " * _columns(before), "^" * max(1, _columns(marked))
    head = f"{gutter}{indent}{carets}  "
    if _columns(head) + min(len(problem.hint), 24) > _width():
        return [
            *lines,
            f"{gutter}{indent}{_painted(carets, _YELLOW, colour)}",
            *_wrapped(problem.hint, gutter, gutter),
        ]
    hint = _wrapped(problem.hint, head, gutter + " " * (len(head) - len(gutter)))
    return lines + [line.replace(carets, _painted(carets, _YELLOW, colour), 1) for line in hint or [head.rstrip()]]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        _clean(text),
        _width(),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    return max(40, min(get_terminal_size((100, 24)).columns, 120))


def _columns(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    combining = sum(unicodedata.combining(character) > 0 for character in text)
    return len(text) + wide - combining


def _clean(text: str) -> str:
    """Without what would move the cursor or colour the screen."""
    return "".join(character if character.isprintable() else " " for character in text)


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[{_PLAIN}m" if colour else text


def _colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
