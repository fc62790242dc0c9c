"""Pydantic's errors as problems that a person can act on.

Turns every error into one `Problem`: the key, what was written there, what is allowed, and the near match
or what another tool's key is called here. Doesn't find mistakes itself; `schema` and `contradictions` do.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_cli.config.allowed import Allowed, near
from lora_cli.config.document import Document, Path_, dotted, holds
from lora_cli.config.rivals import OURS, our_name
from lora_cli.config.secrets import redact
from lora_cli.errors import Place, Problem

MANY_CHOICES = 6
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def problems_of(error: ValidationError, document: Document, allowed: Allowed) -> dict[Path_, Problem]:
    """One problem for every place that has an error."""
    kinds = error_kinds(error, document.value)
    return {path: _problem(kind, path, document, allowed) for path, kind in kinds.items()}


def error_kinds(error: ValidationError, value: Any) -> dict[Path_, str]:
    """Where `value` has errors, each with pydantic's word for it.

    Where a value may be several things, pydantic reports why it is none of them; of those reports the deepest
    counts, and at one place an error of range before one of type.
    """
    kinds: dict[Path_, str] = {}
    for details in error.errors(include_url=False, include_context=False, include_input=False):
        path = _path(details, value)
        if path not in kinds or kinds[path].endswith("_type"):
            kinds[path] = details["type"]
    above = {path[:length] for path in kinds for length in range(len(path))}
    return {path: kind for path, kind in kinds.items() if path not in above}


def _path(details: ErrorDetails, value: Any) -> Path_:
    """Where in the YAML the error is. Pydantic's own way there also names the branches of unions, and
    counts a bare source as a list of one."""
    path: list[str | int] = []
    steps = details["loc"]
    for position, step in enumerate(steps):
        if holds(value, step):
            value = value[step]
        elif details["type"] != "missing" or position < len(steps) - 1:
            continue
        path.append(step)
    return tuple(path)


def _problem(kind: str, path: Path_, document: Document, allowed: Allowed) -> Problem:
    if kind == "extra_forbidden":
        return _unknown(path, document, allowed)
    if kind == "missing":
        mark = document.mark(path[:-1])
        place = mark.key or mark.value if mark is not None and len(path) > 1 else _top(document)
        description = allowed.description(path)
        return Problem(dotted(path), "missing", description[:1].lower() + description[1:], place)
    mark = document.mark(path)
    written = mark.written if mark is not None else ""
    words = allowed.words(path)
    if kind in ("too_short", "string_too_short"):
        return Problem(dotted(path), f"{written or 'the value'} is empty", words, _value_place(document, path))
    if kind.startswith(("greater_than", "less_than")):
        return Problem(dotted(path), f"{written} is out of range", words, _value_place(document, path))
    noun = "a finite number" if kind == "finite_number" else allowed.kind(path)
    choices = allowed.choices(path)
    message = f"{written or 'nothing'} is not {noun if noun and not choices else 'allowed here'}"
    return Problem(dotted(path), message, _hint(written.strip('"'), choices, words), _value_place(document, path))


def _hint(written: str, choices: list[str], words: str) -> str:
    if written.lower().startswith(_CHANGES_THE_BASE):
        return f"{words}; {written} would change the base model's own weights"
    match = near(written, choices)
    if match is None:
        return words
    return f"did you mean `{match}`?" + (f" {words}" if len(choices) <= MANY_CHOICES else "")


def _unknown(path: Path_, document: Document, allowed: Allowed) -> Problem:
    mark = document.mark(path)
    hint = _meant(str(path[-1]), path[:-1], allowed)
    return Problem(redact(dotted(path)), "unknown key", hint, mark.key if mark is not None else None)


def _meant(key: str, section: Path_, allowed: Allowed) -> str:
    """The key that was probably meant: here, in another tool, in another section, or a typo of those."""
    siblings = allowed.keys(section)
    match = near(key, siblings)
    if match is not None and (match.lower() == key.lower() or our_name(key) is None):
        return f"did you mean `{match}`?"
    name = our_name(key) or _elsewhere(key, allowed.everywhere()) or our_name(near(key, OURS) or "")
    if name is None:
        return f"the keys here are {', '.join(siblings)}"
    return f"here it is {name}" if " " in name else f"did you mean `{_from(dotted(section), name)}`?"


def _from(section: str, name: str) -> str:
    """A key's name as seen from a section: without the section's own name."""
    return name.removeprefix(f"{section}.") if section else name


def _elsewhere(key: str, keys: dict[str, list[str]]) -> str | None:
    match = near(key, keys)
    return keys[match][0] if match is not None and len(keys[match]) == 1 else None


def _value_place(document: Document, path: Path_) -> Place | None:
    """The value's place, or its key's where the value is empty or fills several lines."""
    mark = document.mark(path)
    if mark is None:
        return None
    return mark.key if mark.key is not None and mark.written in ("", "a list", "a mapping") else mark.value


def _top(document: Document) -> Place | None:
    mark = document.marks.get(())
    place = mark.value if mark is not None else None
    return Place(place.file, 1, 1, "", 0) if place is not None else None
