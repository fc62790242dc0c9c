"""The screen of `preview`: an example token by token, the trained ones marked.

A line holds trained tokens only, and then begins with `▌`, or untrained ones only: the mark says of every
token what the JSON's `trained` says. Knows nothing about tokenizers or masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from rich.cells import cell_len, chop_cells

from lora_cli.report import numbers
from lora_cli.report.layout import INDENT, page_width, printable, wrap


class PreviewedExample(Protocol):
    """What is shown of an example."""

    @property
    def place(self) -> str:
        """Where it stands: `train.jsonl:1`."""

    @property
    def tokens(self) -> Sequence[str]: ...

    @property
    def trained(self) -> Sequence[int]:
        """1 for each token whose own prediction counts, else 0."""

    @property
    def truncated(self) -> bool: ...

    @property
    def notes(self) -> Sequence[str]: ...


_MARGIN = "    "
_TRAINED = "  ▌ "
_LEGEND = "▌ trained | token edge · space ⏎ newline"


def render_preview(examples: Sequence[PreviewedExample], width: int | None = None) -> str:
    """The examples, then what the signs mean."""
    width = width or page_width()
    blocks = ["\n".join(_example(example, width)) for example in examples]
    return "\n\n".join([*blocks, "\n".join(wrap(_LEGEND, width, first=INDENT))])


def _example(example: PreviewedExample, width: int) -> list[str]:
    trained = sum(example.trained)
    head = f"{example.place}, {numbers.counted(len(example.tokens), 'token')}, {trained:,} trained"
    if example.truncated:
        head += ", truncated"
    lines = [*wrap(head, width, first=INDENT), ""]
    pairs = zip(example.tokens, example.trained, strict=True)
    for is_trained, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        margin = _TRAINED if is_trained else _MARGIN
        lines += [margin + line for line in _lines([token for token, _ in run], width - len(margin))]
    lines.append("")
    for note in example.notes:
        lines += wrap(note, width, first=INDENT)
    return lines if example.notes else lines[:-1]


def _lines(tokens: Sequence[str], room: int) -> list[str]:
    """Tokens side by side, a new line after each that ends in a newline and where the room is used up."""
    lines: list[str] = []
    line, before = "", ""
    for token in tokens:
        shown = printable(token.replace(" ", "·").replace("\n", "⏎"))
        edge = "" if not line or _speaks_for_itself(before) or _speaks_for_itself(token) else "|"
        if line and cell_len(line + edge + shown) > room:
            lines.append(line)
            line, edge = "", ""
        line += edge + shown
        while cell_len(line) > room:  # a token that no line can hold
            head, *_ = chop_cells(line, room)
            lines.append(head)
            line = line[len(head) :]
        if token.endswith("\n"):
            lines.append(line)
            line = ""
        before = token
    return [*lines, line] if line else lines


def _speaks_for_itself(token: str) -> bool:
    """Whether a token's edges are plain without a sign: `<|im_start|>`, `</s>`."""
    return len(token) > 2 and token.startswith("<") and token.endswith(">")
