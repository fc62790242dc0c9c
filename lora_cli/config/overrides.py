"""`--set key=value`: one value put into a document, as if the file had said so.

The value is YAML, so lists and mappings work; it is validated with the rest, in the same pass.
"""

from __future__ import annotations

from typing import Any

from lora_cli.config.document import Document, Mark, Path_, dotted, holds, read_document
from lora_cli.errors import Problem


def apply_override(override: str, document: Document) -> None:
    """Change `document`; what is wrong with the override becomes one of its problems. The last one wins."""
    key, equals, text = override.partition("=")
    key = key.strip()
    steps = as_path(key)
    if not equals or "" in steps:
        document.problems.append(Problem(key, "is not KEY=VALUE", "such as train.learning_rate=1e-4"))
        return
    read = read_document(text, None)
    for problem in read.problems:
        where = ".".join(filter(None, (key, problem.key)))
        document.problems.append(Problem(where, problem.message, problem.hint))
    if read.problems:
        return
    target = _parent(steps, document)
    if isinstance(target, dict):
        target[str(steps[-1])] = read.value
    elif holds(target, steps[-1]):
        target[steps[-1]] = read.value
    else:
        document.problems.append(Problem(key, f"{dotted(steps[:-1])} is not a mapping", "set it as a whole"))
        return
    document.marks[steps] = Mark(None, None, "null")
    document.marks.update({(*steps, *path): mark for path, mark in read.marks.items()})


def as_path(key: str) -> Path_:
    """`data.train.0.path` as steps; a number counts into a list."""
    return tuple(int(step) if step.isdecimal() else step for step in key.split("."))


def _parent(steps: Path_, document: Document) -> Any:
    """What holds the value. A section that isn't there, or is null, comes into being."""
    target: Any = document.value
    for position, step in enumerate(steps[:-1]):
        inner = target[step] if holds(target, step) else None
        if inner is None and isinstance(target, dict):
            inner = target[str(step)] = {}
            document.marks[steps[: position + 1]] = Mark(None, None, "{}")
        target = inner
    return target
