"""Files that are whole or absent: written under a temporary name in the same folder, flushed, and renamed.

Knows nothing about runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text`. Whoever reads it, at any instant, finds the old content or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes a private file; what lies in a run folder has the permissions of any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(without_infinities(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def without_infinities(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: without_infinities(inner) for key, inner in value.items()}
        case list() | tuple():
            return [without_infinities(inner) for inner in value]
        case _:
            return value


def settle(folder: Path) -> None:
    """Makes what libraries wrote into `folder` last, with the permissions of any other new file."""
    for path in folder.iterdir():
        os.chmod(path, 0o666 & ~_umask())
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Makes what was written to a file, or renamed in a folder, last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed left in `folder` under a temporary name, theirs and other folders'."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
