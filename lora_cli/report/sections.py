"""The sections of report.html below the curves: samples, data, config, environment. All text is escaped here.

Each function returns an empty string where it has nothing to show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import Any

from lora_cli.report import numbers
from lora_cli.report.svg import Bar, draw_bars

_SAMPLES_SHOWN = 5
_CHARACTERS_SHOWN = 1500
_CONFIG_CHARACTERS = 40_000
_PLACES_SHOWN = 10


@dataclass(frozen=True)
class Sample:
    """What the base and the adapter make of a validation prompt."""

    prompt: str
    reference: str
    base: str
    adapter: str


@dataclass(frozen=True)
class MaskedExample:
    """A training example as the loss sees it."""

    place: str
    """Where it stands: `train.jsonl:1`."""
    pieces: Sequence[tuple[str, bool]]
    """Its text in order, and whether each piece is trained."""


def render_samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    note = "Words in which the adapter's answer differs from the base's are marked."
    shown = "".join(map(_sample, samples[:_SAMPLES_SHOWN]))
    return f"<section><h2>Samples</h2><figcaption>{note}</figcaption>{shown}</section>"


def _sample(sample: Sample) -> str:
    right = ' <span class="same">as the reference</span>'
    answers = (
        ("reference", "", escape(_clipped(sample.reference))),
        ("base", right if _equal(sample.base, sample.reference) else "", escape(_clipped(sample.base))),
        (
            "adapter",
            right if _equal(sample.adapter, sample.reference) else "",
            _marked(sample.base, sample.adapter),
        ),
    )
    columns = "".join(
        f'<div><span class="soft">{name}</span>{verdict}<p class="words">{text}</p></div>'
        for name, verdict, text in answers
    )
    prompt = f'<p class="prompt words">{escape(_clipped(sample.prompt))}</p>'
    return f'<div class="sample">{prompt}<div class="answers">{columns}</div></div>'


def _equal(left: str, right: str) -> bool:
    return left.strip() == right.strip()


def _clipped(text: str) -> str:
    more = len(text) - _CHARACTERS_SHOWN
    return text if more <= 0 else f"{text[:_CHARACTERS_SHOWN]} ... and {numbers.counts(more)} more characters"


def _marked(before: str, after: str) -> str:
    """`after` with the words marked that `before` doesn't have in that place."""
    old, new = (re.findall(r"\s+|\S+", _clipped(text)) for text in (before, after))
    html = ""
    for what, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        words = escape("".join(new[start:end]))
        html += words if what == "equal" or not words.strip() else f"<mark>{words}</mark>"
    return html


def render_data(data: Mapping[str, Any] | None, max_length: int | None, example: MaskedExample | None) -> str:
    """`data` holds the fields of `DataAccount`."""
    if data is None:
        return ""
    supervised = 100 * data["num_supervised_tokens"] / data["num_tokens"] if data["num_tokens"] else 0.0
    rows = [
        ("used", f"{numbers.counts(data['used'])} of {numbers.counted(data['rows'], 'row')}"),
        ("tokens", f"{numbers.counts(data['num_tokens'])}, {numbers.percent(supervised)} of them trained"),
        ("longest row", f"{numbers.counts(data['longest_seen'])} tokens"),
        (
            "truncated",
            f"{numbers.counted(data['truncated'], 'row')}, to {numbers.counts(data['longest'])} tokens",
        ),
    ]
    if not data["truncated"]:
        rows.pop()
    for reason, places in data["reasons"].items():
        shown = ", ".join(places[:_PLACES_SHOWN])
        more = len(places) - _PLACES_SHOWN
        also = f" and {numbers.counts(more)} more" if more > 0 else ""
        rows.append(("dropped", f"{numbers.counted(len(places), 'row')}, {reason}: {shown}{also}"))
    return f"<section><h2>Data</h2>{_table(rows)}{_lengths(data['lengths'], max_length)}{_masked(example)}</section>"


def _lengths(bins: Sequence[tuple[int, int]], max_length: int | None) -> str:
    """How long the examples are, in bins that double."""
    if not bins:
        return ""
    bars = [Bar(f"to {most:,}", count, numbers.counts(count)) for most, count in bins]
    limit = f" data.max_length is {max_length:,}." if max_length is not None else ""
    note = f"Examples by their number of tokens.{limit}"
    return (
        f"<h3>Lengths</h3><figure><figcaption>{note}</figcaption>{draw_bars('lengths of the examples', bars)}</figure>"
    )


def _masked(example: MaskedExample | None) -> str:
    """One example, the trained words underlined: what the loss sees."""
    if example is None:
        return ""
    left, html = _CHARACTERS_SHOWN, ""
    for text, trained in example.pieces:
        words = escape(text[:left])
        html += f"<ins>{words}</ins>" if trained else words
        left -= len(text)
        if left <= 0:
            html += " ..."
            break
    note = f"{escape(example.place)}; underlined is what is trained."
    return f'<h3>One example</h3><figcaption>{note}</figcaption><p class="masked words">{html}</p>'


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(n)}</th><td>{escape(t)}</td></tr>" for n, t in rows) + "</table>"


_KEY = re.compile(r"( *)([\w.-]+):")


def render_config(text: str, non_defaults: frozenset[str]) -> str:
    """The YAML, the lines of the settings in `non_defaults` (dotted keys) in bold."""
    lines = []
    path: list[tuple[int, str]] = []
    bold = False
    for line in text[:_CONFIG_CHARACTERS].splitlines():
        key = _KEY.match(line)
        if key:  # any other line, such as an item of a list, goes with the key above it
            indent = len(key[1])
            path = [(outer, name) for outer, name in path if outer < indent] + [(indent, key[2])]
            names = [name for _, name in path]
            bold = any(".".join(names[:length]) in non_defaults for length in range(1, len(names) + 1))
        lines.append(f"<b>{escape(line)}</b>" if bold and line.strip() else escape(line))
    return "\n".join(lines)


def render_environment(environment: Mapping[str, Any]) -> str:
    rows = [(name.replace("_", " "), _in_words(value)) for name, value in environment.items()]
    return "<h3>Made with</h3>" + _table([(name, text) for name, text in rows if text])


def _in_words(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case Mapping():
            return ", ".join(f"{name} {_in_words(inner)}" for name, inner in value.items() if inner is not None)
        case list() | tuple():
            return ", ".join(map(_in_words, value))
        case _:
            return str(value)
