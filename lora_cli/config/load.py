"""A config file and its overrides as a `Config`, or all of their mistakes at once.

The one way from YAML to a `Config`: read, apply `--set`, validate every field, then the rules between
fields, then look for secrets. Reads the config file and nothing else; whether models and data exist is
found out later.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_cli.config.allowed import Allowed
from lora_cli.config.contradictions import Contradiction, contradictions
from lora_cli.config.document import Document, Path_, dotted, read_document
from lora_cli.config.json_schema import config_schema
from lora_cli.config.overrides import apply_override, as_path
from lora_cli.config.problems import error_kinds, problems_of
from lora_cli.config.schema import Config
from lora_cli.config.secrets import holds_secret
from lora_cli.errors import ConfigError, Place, Problem, UserError

MAX_BYTES = 1 << 20

# Stand in for what is missing, so that the rules between the other fields can still be checked.
_PLACEHOLDERS: dict[str | int, Any] = {
    "model": {"name_or_path": "-"},
    "data": {"train": "-"},
    "name_or_path": "-",
    "train": "-",
    "path": "-",
    "type": "nf4",
    "output_dir": "-",
    "grid": {"train.seed": [0]},
    "every": 1,
}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in the file at `path`, with `overrides` such as `train.learning_rate=1e-4` on top.

    Raises:
        UserError: no such file, or a folder.
        ConfigError: everything that is wrong with it, in file order; then what is wrong with the overrides.
    """
    return validate(read_config(path, overrides), str(path))


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Document:
    """The mapping in the file at `path` with `overrides` put into it; its values aren't looked at yet.

    Raises:
        UserError, ConfigError: as `load_config` does for what isn't a mapping.
    """
    path = Path(path)
    document = _read_file(path)
    _require_mapping(document, path)
    for override in overrides:
        apply_override(override, document)
    return document


def _read_file(path: Path) -> Document:
    where = path.absolute()
    if path.is_dir():
        inner = path / "config.yaml"
        remedy = f"It holds a config: {inner}" if inner.is_file() else "Give the YAML file itself."
        raise UserError(f"{where} is a folder, not a config", remedy=remedy)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        remedy = f"`lora init {path}` writes a starter."
        raise UserError(f"no config at {where}", remedy=remedy) from None
    except OSError as error:
        raise UserError(f"can't read {where}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{where} is over 1 MiB, too large for a config", remedy="Give the YAML file of the run.")
    try:
        return read_document(raw.decode("utf-8-sig"), path)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be a config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), (_not_utf8(raw, error, path),)) from None


def _not_utf8(raw: bytes, error: UnicodeDecodeError, path: Path) -> Problem:
    before = raw[: error.start].decode("utf-8", errors="replace").split("\n")
    place = Place(path, len(before), len(before[-1]) + 1, "", 0)
    return Problem("", f"not UTF-8: byte 0x{raw[error.start]:02X}", "save the file as UTF-8", place)


def _require_mapping(document: Document, path: Path) -> None:
    if document.value is None and document.problems:
        raise ConfigError(str(path), tuple(document.problems))
    if isinstance(document.value, dict):
        return
    place: Place | None = Place(path, 1, 1, "", 0)
    if document.value is None:
        message = "the file is empty"
    else:
        kind = "a list" if isinstance(document.value, list) else "no mapping"
        message, place = f"{kind} at the top", document.marks[()].value
    hint = "a config is a mapping of model, adapter, data, train and output_dir; `lora init` writes one"
    raise ConfigError(str(path), (Problem("", message, hint, place),))


def validate(document: Document, source: str) -> Config:
    """The document as a config.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    problems = [*document.problems, *_secrets(document.value, (), document), *_empty_adapter(document)]
    try:
        config = Config.model_validate(document.value)
    except ValidationError as error:
        found = problems_of(error, document, Allowed(config_schema()))
        problems += found.values()
        partial = _without(document.value, error)
        bad = tuple(dotted(path) for path in found)
    else:
        partial, bad = config, ()
    if partial is not None:
        problems += (_placed(each, document) for each in contradictions(partial) if not _touches(each, bad))
    if problems:
        raise ConfigError(source, tuple(sorted(problems, key=_file_order)))
    return config


def _empty_adapter(document: Document) -> Iterator[Problem]:
    """`adapter:` with nothing after it is null in YAML, and null trains every weight: too much for a slip."""
    mark = document.marks.get(("adapter",))
    if mark is not None and mark.empty and mark.key is not None:
        hint = "`adapter: {}` for the defaults, `adapter: null` for full fine-tuning"
        yield Problem("adapter", "is empty", hint, mark.key)


def _secrets(value: Any, path: Path_, document: Document) -> Iterator[Problem]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(inner, (*path, key), document)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, (*path, index), document)
    elif isinstance(value, str) and holds_secret(value):
        mark = document.mark(path)
        hint = "it would be copied into the run folder; put it into the environment, as HF_TOKEN"
        yield Problem(dotted(path), "holds an access token or a password", hint, mark.value if mark else None)


def _without(value: Any, error: ValidationError) -> Config | None:
    """What is left of the config once its mistakes are taken out, so that its rules can still be checked."""
    value = copy.deepcopy(value)
    for _ in range(8):
        for path, kind in error_kinds(error, value).items():
            _take_out(value, path, missing=kind == "missing")
        try:
            return Config.model_validate(value)
        except ValidationError as remaining:
            error = remaining
    return None


def _take_out(value: Any, path: Path_, *, missing: bool) -> None:
    """Drop the value at `path`, or the list that it is in; give a placeholder to what is missing."""
    for step in path[:-1]:
        if isinstance(value.get(step), list):
            path = (step,)
            break
        if not isinstance(value.get(step), dict):
            return  # the list that it was in has been taken out for another mistake
        value = value[step]
    if missing and len(path) > 0 and path[-1] not in value:
        value[path[-1]] = copy.deepcopy(_PLACEHOLDERS[path[-1]])
    else:
        value.pop(path[-1], None)


def _touches(contradiction: Contradiction, bad: tuple[str, ...]) -> bool:
    keys = (contradiction.key, *contradiction.others)
    return any(f"{key}.".startswith(f"{wrong}.") or f"{wrong}.".startswith(f"{key}.") for key in keys for wrong in bad)


def _placed(contradiction: Contradiction, document: Document) -> Problem:
    mark = document.mark(as_path(contradiction.key))
    place = (mark.key or mark.value) if mark is not None else None
    return Problem(contradiction.key, contradiction.message, contradiction.hint, place)


def _file_order(problem: Problem) -> tuple[float, int]:
    return (problem.place.line, problem.place.column) if problem.place is not None else (float("inf"), 0)
