"""Opening what a config names as data: a local file, a folder saved by `datasets`, or a hub id.

No data set's own code is ever run and no pickle is read. `datasets` is imported only for what needs it, as
the import takes longer than reading a small file. Knows nothing about what the columns mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.config import Source
from lora_cli.data.files import Row, Rows, open_file
from lora_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_ENDING = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt|arrow|gz|bz2|xz|zst)$", re.IGNORECASE)


@dataclass(frozen=True)
class ArrowRows:
    """A table of `datasets`, memory-mapped. Rows are numbered from 0, as its indices are."""

    name: str
    table: Dataset

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        yield from enumerate(self.table)

    @property
    def around_number(self) -> tuple[str, str]:
        return f"{self.name}[", "]"

    def count(self) -> int:
        return len(self.table)

    def fingerprint(self) -> str:
        return str(self.table._fingerprint)


def open_source(source: Source) -> Rows:
    """The rows that a source names.

    Raises:
        DataError: it isn't there, can't be read, or has no such split.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        if source.split is not None:
            raise DataError(
                f"{path}: a file has no splits, but split {source.split!r} was asked for",
                remedy="Remove `split`, or name the file that holds these rows.",
            )
        return open_file(path)
    if path.is_dir():
        return _open_saved(path, source.split)
    if path.exists():
        raise DataError(f"{path.absolute()}: a pipe or a device, not a file", remedy="Rows are read more than once.")
    if path.is_absolute() or _FILE_ENDING.search(source.path) or not _HUB_ID.fullmatch(source.path):
        raise DataError(f"{path.absolute()}: no such file or folder", remedy="Named under `data` in the config.")
    return _open_hub(source)


def _open_saved(path: Path, split: str | None) -> Rows:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise DataError(
            f"{path}: a folder without state.json or dataset_dict.json, which datasets would have saved",
            remedy="Name the data files in it instead; several make a list under `data.train`.",
        )
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: datasets can't read the folder: {_first_line(error)}") from error
    if isinstance(loaded, DatasetDict):
        chosen = _choose_split(str(path), [str(name) for name in loaded], split)
        return ArrowRows(f"{path.name}[{chosen}]", loaded[chosen])
    if split is not None:
        raise DataError(
            f"{path}: the folder has one table and no splits, but split {split!r} was asked for",
            remedy="Remove `split`.",
        )
    assert isinstance(loaded, Dataset)
    return ArrowRows(path.name, loaded)


def _open_hub(source: Source) -> Rows:
    from datasets import Dataset, DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        loaded = load_dataset(source.path, split=source.split, revision=source.revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{source.path}: neither a local path nor a data set on the hub that can be reached",
            remedy=f"Looked for {Path(source.path).absolute()}, then on the hub ({_first_line(error)}).\n"
            "For a private data set log in with `hf auth login`; without network name a local file.",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source.path}: datasets can't load it: {_first_line(error)}",
            remedy="Check `split` and `revision`; without network name a local file.",
        ) from error
    if isinstance(loaded, DatasetDict):
        chosen = _choose_split(source.path, [str(name) for name in loaded], None)
        return ArrowRows(f"{source.path}[{chosen}]", loaded[chosen])
    assert isinstance(loaded, Dataset)
    return ArrowRows(f"{source.path}[{source.split}]", loaded)


def _choose_split(name: str, splits: list[str], wanted: str | None) -> str:
    if wanted in splits:
        return str(wanted)
    if wanted is not None:
        raise DataError(f"{name}: no split {wanted!r}", remedy=f"It has: {', '.join(splits)}.")
    if len(splits) == 1:
        return splits[0]
    if "train" in splits:
        return "train"
    raise DataError(
        f"{name}: has several splits and none is named", remedy=f"Set `split` to one of {', '.join(splits)}."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
