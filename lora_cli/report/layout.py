"""Building blocks of the screens: a label column, word wrap, tables, commands.

Everything here turns values into lines of plain text no wider than asked. Widths are in terminal cells, so
that Chinese and emoji count for what they take up. Three things are never broken: a number and its unit, a
cell of a table, a path. Knows nothing about plans, runs or colour.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells

INDENT = "  "
LABEL_WIDTH = 9
DEFAULT_WIDTH = 100
"""Where neither COLUMNS nor a terminal sets a width, as in a log file."""
NARROWEST = 40

# No line breaks between a number and the word or unit that it counts.
_BREAK = re.compile(r"(?<!\d) (?!%)| (?![a-zA-Z%])")


def columns() -> int | None:
    """How wide a line may be, by COLUMNS or else the terminal; None where nothing limits it."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return max(NARROWEST, int(asked))
    for stream in (sys.stderr, sys.stdout):
        try:
            width = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):  # not a terminal; closed; without a file descriptor
            continue
        if width > 0:
            return max(NARROWEST, width)
    return None


def page_width() -> int:
    """The width to lay a screen out for."""
    return columns() or DEFAULT_WIDTH


def printable(text: str) -> str:
    """`text` with control characters spelled out: a path or a row must not be able to steer the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )


def short_path(path: str | os.PathLike[str]) -> str:
    """`path` relative to the working directory where it lies inside, else as it is."""
    whole = os.path.abspath(path)
    relative = os.path.relpath(whole)
    return os.fspath(path) if relative.startswith(os.pardir) else relative


def wrap(text: str, width: int, *, first: str = "", rest: str | None = None) -> list[str]:
    """`text` in lines of at most `width` cells, the first after `first` and the others after `rest`.

    Newlines in `text` stay. Only a path may be wider than a line.
    """
    hanging = " " * cell_len(first) if rest is None else rest
    room = width - max(cell_len(first), cell_len(hanging))
    lines: list[str] = []
    for paragraph in printable(text).split("\n"):
        line = ""
        for word in _words(paragraph, room):
            if line and cell_len(line) + 1 + cell_len(word) > room:
                lines.append(line)
                line = word
            else:
                line += f" {word}" if line else word
        lines.append(line)
    leads = [first] + [hanging] * (len(lines) - 1)
    return [(lead + line).rstrip() for lead, line in zip(leads, lines, strict=True)]


def _words(text: str, room: int) -> list[str]:
    """The words of `text`; one that no line can hold is chopped, unless it's a path."""
    words: list[str] = []
    for word in _BREAK.split(text):
        if word and (cell_len(word) <= room or "/" in word):
            words.append(word)
        elif word:
            words.extend(chop_cells(word, max(1, room)))
    return words


def labelled(label: str, text: str, width: int, *, lead: str = INDENT) -> list[str]:
    """`text` beside its label, its further lines below itself."""
    return wrap(text, width, first=f"{lead}{label:<{LABEL_WIDTH}}")


def warning(text: str, width: int) -> list[str]:
    return wrap(text, width, first=f"{INDENT}!  ")


def command(words: Sequence[str], width: int, *, first: str = INDENT) -> list[str]:
    """A command that runs as pasted: quoted for the shell, continued with a backslash where too wide."""
    hanging = " " * (len(first) + 2)
    lines: list[str] = []
    line = first
    for number, word in enumerate(map(shlex.quote, words)):
        if number and cell_len(line) + 1 + cell_len(word) + 2 > width:
            lines.append(line + " \\")
            line = hanging + word
        else:
            line += (" " if number else "") + word
    return [*lines, line]


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, dispensable: int | None = None
) -> list[str]:
    """Rows under a header: the first column to the left, the others, which hold numbers, to the right.

    Where that is too wide the columns close up, then the one numbered `dispensable` goes, and at last each
    row becomes a short list of its own. No cell is ever cut.
    """
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    for gap in (3, 2):
        if len(INDENT) + sum(widths) + gap * (len(widths) - 1) <= width:
            return [_side_by_side(row, widths, gap) for row in cells]
    if dispensable is not None:
        fewer = [[cell for number, cell in enumerate(row) if number != dispensable] for row in cells]
        return table(fewer[0], fewer[1:], width)
    return [line for row in cells[1:] for line in _record(cells[0], row, width)]


def _side_by_side(row: Sequence[str], widths: Sequence[int], gap: int) -> str:
    line = INDENT + row[0] + " " * (widths[0] - cell_len(row[0]))
    for number, wide in zip(row[1:], widths[1:], strict=True):
        line += " " * (gap + wide - cell_len(number)) + number
    return line.rstrip()


def _record(header: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    label_width = max(map(cell_len, header)) + 2
    lines = wrap(row[0], width, first=INDENT)
    for name, cell in zip(header[1:], row[1:], strict=True):
        if cell:
            lines.append(f"{INDENT * 2}{name:<{label_width}}{cell}")
    return lines
