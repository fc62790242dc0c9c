"""The screen of `preview`: an example token by token, the trained ones marked.

A line holds trained tokens only, and then begins with `▌`, or untrained ones only: the mark says of every token
what the JSON's `trained` says. A letter in the margin says whose words a line holds. Knows nothing about tokenizers
or masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    def roles(self) -> Sequence[str]:
        """Whose words each token belongs to; empty for what the template writes."""

    @property
    def truncated(self) -> bool: ...

    @property
    def notes(self) -> Sequence[str]: ...


class Packed(Protocol):
    """A micro-batch of these examples."""

    @property
    def places(self) -> Sequence[str]: ...

    @property
    def boundaries(self) -> Sequence[int]:
        """Tokens before each example, and the length of all."""


_MARGIN = "    "
_TRAINED = "  ▌ "
_LEGEND = "▌ trained | token edge · space ⏎ newline"
_INITIALS = {"system": "s", "developer": "d", "user": "u", "assistant": "a", "tool": "t"}


def render_preview(
    examples: Sequence[PreviewedExample],
    packs: Sequence[Packed] = (),
    micro_batch_tokens: int = 0,
    width: int | None = None,
) -> str:
    """The examples, how they would be packed, and what the signs mean."""
    width = width or page_width()
    blocks = ["\n".join(_example(example, width)) for example in examples]
    if packs:
        blocks.append("\n".join(_packing(packs, micro_batch_tokens, width)))
    shown = {role for example in examples for role in example.roles}
    roles = ", ".join(f"{initial} {role}" for role, initial in _INITIALS.items() if role in shown)
    legend = wrap(_LEGEND, width, first=INDENT) + (wrap(roles, width, first=INDENT) if roles else [])
    return "\n\n".join([*blocks, "\n".join(legend)])


def _packing(packs: Sequence[Packed], micro_batch_tokens: int, width: int) -> list[str]:
    """One line per micro-batch: its length, and where in it each example begins."""
    head = f"as one step, in micro-batches of at most {numbers.counted(micro_batch_tokens, 'token')}:"
    lines = wrap(head, width, first=INDENT)
    for pack in packs:
        parts = [f"{place} at {start:,}" for place, start in zip(pack.places, pack.boundaries, strict=False)]
        text = f"{numbers.counted(pack.boundaries[-1], 'token')}: {', '.join(parts)}"
        lines += wrap(text, width, first=INDENT * 2)
    return lines


def _example(example: PreviewedExample, width: int) -> list[str]:
    trained = sum(example.trained)
    head = f"{example.place}, {numbers.counted(len(example.tokens), 'token')}, {trained:,} trained"
    if example.truncated:
        head += ", truncated"
    lines = [*wrap(head, width, first=INDENT), ""]
    for is_trained, role, tokens in _runs(example):
        margin = _TRAINED if is_trained else _MARGIN
        initial = _INITIALS.get(role, "")
        if initial and not (is_trained and role == "assistant"):  # whose words the trained ones are, everybody knows
            margin = f"{initial} {margin[2:]}"
        lines += [margin + line for line in _lines(tokens, width - len(margin))]
    lines.append("")
    for note in example.notes:
        lines += wrap(note, width, first=INDENT)
    return lines if example.notes else lines[:-1]


def _runs(example: PreviewedExample) -> Iterator[tuple[bool, str, list[str]]]:
    """Neighbouring tokens that are trained or not and somebody's words: (trained, whose, tokens)."""
    roles = example.roles or [""] * len(example.tokens)
    marked = [
        # What the template writes between trained words is trained as theirs.
        (bool(trained), role or ("assistant" if trained else ""))
        for trained, role in zip(example.trained, roles, strict=True)
    ]
    pairs = zip(marked, example.tokens, strict=True)
    for (is_trained, role), run in groupby(pairs, key=lambda pair: pair[0]):
        yield is_trained, role, [token for _, token in run]


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
