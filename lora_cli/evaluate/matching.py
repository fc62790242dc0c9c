"""How an answer compares with its reference: the same text, nearly the same, JSON with the same fields.

Every comparison gives a number from 0 to 1. Knows strings only.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.evaluate.overlap import chrf, overlap_is_measured, rouge_l

_PUNCTUATION = re.compile(r"[^\w\s]")
_NOTHING = object()


@dataclass(frozen=True)
class Marks:
    """One measure of answers: a number for each, and whether the question is one that it speaks of."""

    name: str
    values: NDArray[np.float64]
    counted: NDArray[np.float64]
    """1 or 0"""


def mark(
    answers: Sequence[str], references: Sequence[str], ended: Sequence[bool], pattern: re.Pattern[str] | None = None
) -> tuple[Marks, ...]:
    """Every measure that speaks of these references; those of JSON only where a reference is a JSON object or list.

    Args:
        ended: whether the model ended the answer by itself.
        pattern: what to find in answer and reference; questions in whose reference it isn't found don't count.
    """
    pairs = list(zip(answers, references, strict=True))
    everywhere = np.ones(len(pairs))
    found = [
        Marks("exact_match", _numbers(exact(*pair) for pair in pairs), everywhere),
        Marks("normalised_match", _numbers(normalised(a) == normalised(r) for a, r in pairs), everywhere),
    ]
    if overlap_is_measured():
        found += [Marks("rouge_l", rouge_l(pairs), everywhere), Marks("chrf", chrf(pairs), everywhere)]
    structured = _numbers(_structure(reference) is not _NOTHING for reference in references)
    if structured.any():
        valid = _numbers(_structure(answer) is not _NOTHING for answer in answers)
        fields = _numbers(matching_fields(*pair) for pair in pairs)
        found += [
            Marks("valid_json", valid * structured, structured),
            Marks("matching_fields", fields * structured, structured),
        ]
    if pattern is not None:
        wanted = [extract(pattern, reference) for reference in references]
        counted = _numbers(text is not None for text in wanted)
        same = _numbers(extract(pattern, answer) == text for answer, text in zip(answers, wanted, strict=True))
        found.append(Marks("pattern_match", same * counted, counted))
    return (*found, Marks("ended_by_itself", _numbers(ended), everywhere))


def exact(answer: str, reference: str) -> bool:
    """The same text, apart from white space around it."""
    return answer.strip() == reference.strip()


def normalised(text: str) -> str:
    """Without case, punctuation, and differences of white space and Unicode form."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_PUNCTUATION.sub(" ", folded).split())


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """What a pattern finds first in a text: its first group where it has one, else the whole match."""
    match = pattern.search(text)
    if match is None:
        return None
    found: str | None = match[1] if pattern.groups else match[0]
    return None if found is None else found.strip()


def matching_fields(answer: str, reference: str) -> float:
    """The share of fields, over both objects, that have the same value in both; other JSON is equal or isn't."""
    given, wanted = _structure(answer), _structure(reference)
    if given is _NOTHING or wanted is _NOTHING:
        return 0.0
    if not (isinstance(given, dict) and isinstance(wanted, dict)):
        return float(_same(given, wanted))
    names = given.keys() | wanted.keys()
    same = sum(_same(given.get(name, _NOTHING), wanted.get(name, _NOTHING)) for name in names)
    return same / len(names) if names else 1.0


def _structure(text: str) -> Any:
    """The JSON object or list that a text is, or nothing. `12` and `"yes"` are JSON, too, but nobody means it so."""
    if not text.strip().startswith(("{", "[")):
        return _NOTHING
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _same(one: Any, other: Any) -> bool:
    """Equal, where 1 is not true."""
    return one is other or (one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def _numbers(values: Iterable[Any]) -> NDArray[np.float64]:
    return np.array([float(value) for value in values])
