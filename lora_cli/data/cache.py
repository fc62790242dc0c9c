"""Tokenized sources kept between runs, so that a second start is immediate.

An entry is a folder named by a hash of everything that its content depends on: the data's content, the
tokenizer and its template, the settings, this package's code and the libraries'. It is written under a
temporary name and renamed when complete: two processes may do the same work, and the first to finish wins.
Knows files; knows nothing about rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.data.store import DTYPES, Arrays, map_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_META = "meta.json"
_WRITING = ".writing-"
_DAY_SECONDS = 24 * 60 * 60


def cache_folder() -> Path:
    """Where tokenized data is kept: LORA_CACHE_DIR, or else .cache/lora in the home folder."""
    root = os.environ.get("LORA_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "lora") / "tokenized"


@dataclass(frozen=True)
class Entry:
    """A complete entry."""

    arrays: Arrays
    meta: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What the cache takes."""

    entries: int
    size_bytes: int


@dataclass(frozen=True)
class Cache:
    folder: Path

    def usage(self) -> Usage:
        sizes = [_folder_bytes(place) for place in self._places()]
        return Usage(len(sizes), sum(sizes))

    def clear(self) -> Usage:
        """Delete every entry; what was deleted. A run that has an entry mapped keeps what it has mapped."""
        deleted = self.usage()
        for place in self._places():
            shutil.rmtree(place, ignore_errors=True)
        return deleted

    def _places(self) -> list[Path]:
        """Every entry, and what a process that was killed left half-written."""
        try:
            return [place for place in self.folder.iterdir() if place.is_dir() and not _being_written(place)]
        except OSError:  # nothing was ever kept
            return []

    def find(self, key: str) -> Entry | None:
        """The entry, or None where there is none or it is damaged."""
        place = self.folder / key
        try:
            meta = json.loads((place / _META).read_text(encoding="utf-8"))
            if any((place / f"{name}.bin").stat().st_size != size for name, size in meta["bytes"].items()):
                return None
            return Entry(map_arrays(place), meta["content"])
        except (OSError, ValueError, KeyError):
            return None

    def begin(self) -> Path:
        """A folder to write a new entry into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_WRITING, dir=self.folder))

    def complete(self, written: Path, key: str, content: dict[str, Any]) -> Entry:
        """Put a written entry in its place."""
        sizes = {name: (written / f"{name}.bin").stat().st_size for name in DTYPES}
        meta = json.dumps({"bytes": sizes, "content": content})
        (written / _META).write_text(meta, encoding="utf-8")
        for path in written.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        place = self.folder / key
        if self.find(key) is None:
            shutil.rmtree(place, ignore_errors=True)  # damaged
            try:
                os.rename(written, place)
            except OSError:  # another process was faster
                if self.find(key) is None:
                    raise
        entry = self.find(key)
        shutil.rmtree(written, ignore_errors=True)
        assert entry is not None
        return entry


def _being_written(place: Path) -> bool:
    try:
        return place.name.startswith(_WRITING) and time.time() - place.stat().st_mtime < _DAY_SECONDS
    except OSError:  # it is complete by now
        return True


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # another process has just deleted it
            continue
    return total


def key_of(parts: dict[str, Any]) -> str:
    """A hash of plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer and its chat template."""
    parts = {
        "tokenizer": hashlib.blake2b(_backend_json(tokenizer).encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    return key_of(parts)


def _backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    # Truncation and padding are the last call's, not the tokenizer's; no call of ours uses them.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({key: value for key, value in content.items() if key not in ("truncation", "padding")})


@lru_cache(maxsize=1)
def code_version(folder: Path = Path(__file__).parent) -> str:
    """A hash of the code that tokenized data depends on, ours (this folder) and the libraries'."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("transformers", "tokenizers", "jinja2"):
        digest.update(version(package).encode())
    return digest.hexdigest()
