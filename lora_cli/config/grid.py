"""A grid of settings as the configs of its members, or all of its mistakes at once.

Each combination is put into the config as `--set` would put it there, and validated as a whole; mistakes stand where
the grid has the value. Knows which settings members may differ in, and why the others are shared.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.config.allowed import Allowed, near, number
from lora_cli.config.document import Document, Mark, Path_, read_document
from lora_cli.config.json_schema import config_schema
from lora_cli.config.load import read_config, validate
from lora_cli.config.overrides import as_path
from lora_cli.config.rivals import our_name
from lora_cli.config.schema import Config
from lora_cli.errors import ConfigError, Place, Problem

SHORT = {
    "adapter.r": "r",
    "adapter.lora_alpha": "alpha",
    "adapter.lora_dropout": "dropout",
    "adapter.target_modules": "targets",
    "adapter.exclude_modules": "without",
    "adapter.use_rslora": "rslora",
    "adapter.init_lora_weights": "init",
    "adapter.layers_to_transform": "layers",
    "adapter.rank_pattern": "ranks",
    "adapter.alpha_pattern": "alphas",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "schedule",
    "train.lr_scheduler_kwargs": "schedule-numbers",
    "train.warmup_steps": "warmup",
    "train.weight_decay": "decay",
    "train.adam_beta1": "beta1",
    "train.adam_beta2": "beta2",
    "train.adam_epsilon": "epsilon",
    "train.max_grad_norm": "clip",
    "train.optim": "optim",
    "train.seed": "seed",
    "train.batch_size": "batch",
    "train.num_train_epochs": "epochs",
    "train.max_steps": "steps",
}
"""What members may differ in, with the word for it in their names."""

_SHARED = {
    "model": "all members train on one base",
    "data": "all members are tokenized alike",
    "output_dir": "each member has a folder in it, named after its settings",
    "sweep": "a grid has no grid",
    "adapter": "adapters that change more than a low-rank part can't share a base's passes",
    "train": "it belongs to the passes that all members share, or to what they all write",
}
_LONGEST_VALUE = 20


@dataclass(frozen=True)
class MemberConfig:
    """One combination of a grid."""

    name: str
    """Unique in the grid, and fit for a folder: `03-r16-lr2e-4`."""
    changes: Mapping[str, Any]
    """Its values by dotted key."""
    config: Config
    """The whole config of its run, in a folder of its own, without the grid."""


@dataclass(frozen=True)
class Grid:
    """A config with a grid, and the members."""

    config: Config
    members: tuple[MemberConfig, ...]


def load_grid(path: Path | str, overrides: Sequence[str] = (), grid: Sequence[str] = ()) -> Grid:
    """The grid in the file at `path`.

    Args:
        grid: more of it, or other values, as `adapter.r=[8, 16]`.

    Raises:
        UserError: no such file.
        ConfigError: everything that is wrong with the config; or else with its grid.
    """
    document = read_config(path, overrides)
    for option in grid:
        _add_to_grid(option, document)
    if document.value.get("sweep") is None and not document.problems:
        hint = "a section `sweep: {grid: {adapter.r: [8, 16]}}`, or --grid adapter.r=[8,16]"
        raise ConfigError(str(path), (Problem("sweep.grid", "missing", hint, Place(path, 1, 1, "", 0)),))
    config = validate(document, str(path))
    problems = list(_mistakes(config, document))
    if problems:
        raise ConfigError(str(path), tuple(problems))
    members = _members(config, document, str(path))
    return Grid(config, members)


def _add_to_grid(option: str, document: Document) -> None:
    key, equals, text = (part.strip() for part in option.partition("="))
    read = read_document(text, None) if equals else None
    if not key or read is None or read.problems:
        document.problems.append(Problem(f"--grid {option}", "is not KEY=[VALUE, ...]", "such as adapter.r=[8,16]"))
        return
    sweep = document.value.get("sweep")
    sweep = document.value["sweep"] = sweep if isinstance(sweep, dict) else {}
    inner = sweep.get("grid")
    inner = sweep["grid"] = inner if isinstance(inner, dict) else {}
    inner[key] = read.value
    document.marks.setdefault(("sweep",), Mark(None, None, "{}"))
    document.marks.setdefault(("sweep", "grid"), Mark(None, None, "{}"))
    here: Path_ = ("sweep", "grid", key)
    document.marks.update({(*here, *path): mark for path, mark in read.marks.items()})


def _mistakes(config: Config, document: Document) -> Iterator[Problem]:
    """What is wrong with a grid's keys, with the number of its values, or with two that are the same."""
    assert config.sweep is not None
    grid, allowed = config.sweep.grid, Allowed(config_schema())
    for key, values in grid.items():
        place = _place(document, ("sweep", "grid", key), key=True)
        if key not in SHORT:
            yield Problem(f"sweep.grid.{key}", *_refusal(key, allowed), place)
            continue
        for index, value in enumerate(values):
            first = next(i for i, other in enumerate(values) if _same(value, other))
            if first < index:
                where = _place(document, ("sweep", "grid", key, index))
                yield Problem(f"sweep.grid.{key}", f"{_written(value)} is given twice", "keep one of them", where)
    count = math.prod(len(values) for values in grid.values())
    if count > config.sweep.max_members:
        place = _place(document, ("sweep", "grid"), key=True)
        hint = f"fewer values, or sweep.max_members: {count}"
        yield Problem("sweep.grid", f"{count:,} combinations; at most {config.sweep.max_members:,}", hint, place)
    adapter, train = config.adapter, config.train
    assert adapter is not None
    plain = {
        "adapter.use_dora": not adapter.use_dora,
        "adapter.bias": adapter.bias == "none",
        "adapter.modules_to_save": adapter.modules_to_save is None,
        "adapter.target_parameters": adapter.target_parameters is None,
        "adapter.path": adapter.path is None,
        "train.report_to": not train.report_to,
    }
    for key, fits in plain.items():
        if not fits:
            where = _place(document, as_path(key), key=True)
            yield Problem(key, "is not for a sweep", "members share all but a fresh low-rank adapter each", where)


def _refusal(key: str, allowed: Allowed) -> tuple[str, str]:
    """Why a key can't stand in a grid, and what can."""
    path = as_path(key)
    known = bool(allowed.at(path)) if "" not in path else False
    if known:
        why = _SHARED[str(path[0])]
        if path[-1] == "micro_batch_tokens":
            why = "it changes memory and speed alone, and the members' rows go through the model together"
        return f"can't differ between members: {why}", "set it once, in the config itself"
    leaf = key.split(".")[-1]
    match = our_name(leaf) or near(key, SHORT) or near(leaf, {name.split(".")[-1] for name in SHORT})
    full = next((name for name in SHORT if match in (name, name.split(".")[-1])), None)
    return "unknown key", f"did you mean `{full}`?" if full else f"a grid may have {', '.join(SHORT)}"


def _members(config: Config, document: Document, source: str) -> tuple[MemberConfig, ...]:
    assert config.sweep is not None
    grid = config.sweep.grid
    combinations = list(itertools.product(*(range(len(values)) for values in grid.values())))
    names = _names(grid, combinations)
    problems: dict[Problem, None] = {}
    members: list[MemberConfig] = []
    for name, indices in zip(names, combinations, strict=True):
        changes = {key: values[index] for (key, values), index in zip(grid.items(), indices, strict=True)}
        try:
            own = validate(_with(document, dict(zip(grid, indices, strict=True)), name), source)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
            continue
        members.append(MemberConfig(name, changes, own))
    problems.update(dict.fromkeys(_alike(members, document)))
    if problems:
        raise ConfigError(source, tuple(problems))
    return tuple(members)


def _with(document: Document, indices: Mapping[str, int], name: str) -> Document:
    """The document of one member. The marks of its values are those that they have in the grid."""
    value, marks = copy.deepcopy(document.value), dict(document.marks)
    grid = value.pop("sweep")["grid"]
    for key, index in indices.items():
        path = as_path(key)
        section = value.get(path[0])
        section = value[path[0]] = section if isinstance(section, dict) else {}
        section[str(path[-1])] = grid[key][index]
        here = ("sweep", "grid", key, index)
        found = {mark_path[4:]: mark for mark_path, mark in document.marks.items() if mark_path[:4] == here}
        marks = {old: mark for old, mark in marks.items() if old[: len(path)] != path}
        marks.update({(*path, *rest): mark for rest, mark in found.items()})
    value["output_dir"] = str(Path(value["output_dir"]) / name)
    return Document(value, marks)


def _alike(members: Sequence[MemberConfig], document: Document) -> Iterator[Problem]:
    """Members that would be the same run, though the grid writes them otherwise."""
    seen: dict[str, str] = {}
    for member in members:
        text = member.config.model_copy(update={"output_dir": "-"}).model_dump_json()
        if text in seen:
            place = _place(document, ("sweep", "grid"), key=True)
            message = f"{seen[text]} and {member.name} are the same run"
            yield Problem("sweep.grid", message, "leave out what makes no difference", place)
        seen.setdefault(text, member.name)


def _names(grid: Mapping[str, Sequence[Any]], combinations: Sequence[tuple[int, ...]]) -> list[str]:
    """A number and the values that differ: short enough for a table, and fit for a folder."""
    digits = max(2, len(str(len(combinations))))
    labels = {
        key: [f"{SHORT[key]}{'' if _slug(v) is None else _slug(v)}" for v in values] for key, values in grid.items()
    }
    for key, words in labels.items():
        if len(set(words)) < len(words) or any(_slug(value) is None for value in grid[key]):
            labels[key] = [f"{SHORT[key]}-{count}" for count in range(1, len(words) + 1)]
    return [
        "-".join(
            [f"{place:0{digits}}"]
            + [labels[key][i] for (key, values), i in zip(grid.items(), indices, strict=True) if len(values) > 1]
        )
        for place, indices in enumerate(combinations, start=1)
    ]


def _slug(value: Any) -> str | None:
    """A value as part of a folder's name; None where it is too long or has no plain spelling."""
    if isinstance(value, list) and len(value) <= 2 and all(isinstance(item, str) for item in value):
        value = "+".join(item.removesuffix("_proj") for item in value)
    if isinstance(value, bool) or value is None:
        value = json.dumps(value)
    if isinstance(value, float):
        value = number(value) if abs(value) < 1e-2 else f"{value:g}"
        value = value.replace(".0e", "e")
    if isinstance(value, dict | list):
        return None
    text = str(value)
    if not re.fullmatch(r"[A-Za-z0-9.+_-]+", text) or len(text) > _LONGEST_VALUE:
        return None
    return text if text[0].isdigit() else f"-{text}"


def _same(one: Any, other: Any) -> bool:
    """YAML's true isn't its 1; 16 and 16.0 are one value."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _place(document: Document, path: Path_, *, key: bool = False) -> Place | None:
    mark = document.mark(path)
    if mark is None:
        return None
    return (mark.key or mark.value) if key else (mark.value or mark.key)
