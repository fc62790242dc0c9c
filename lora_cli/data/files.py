"""Rows of local files: JSON Lines, JSON lists, CSV and Parquet.

Read row by row, so that an error names the line and memory stays bounded. Knows formats of files; knows
nothing about what the columns mean.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_cli.data.lines import COMPRESSED, numbered_lines, open_binary, raw_lines
from lora_cli.errors import DataError

Row = dict[str, Any]


class Rows(Protocol):
    """The rows of one source. Iterating twice gives the same rows."""

    @property
    def name(self) -> str:
        """How messages call the source."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Each row with its number: its line in a text file, its position elsewhere."""

    @property
    def around_number(self) -> tuple[str, str]:
        """What a row's place has before and after its number: `train.jsonl:` and nothing."""

    def count(self) -> int:
        """How many rows there are, read as cheaply as the format allows."""

    def fingerprint(self) -> str:
        """A hash of the content."""


@dataclass(frozen=True)
class File:
    """What the file formats have in common."""

    path: Path
    label: str | None = None
    """What to call the file where its own name would not tell it from another."""

    @property
    def name(self) -> str:
        return self.label or self.path.name

    @property
    def around_number(self) -> tuple[str, str]:
        return f"{self.name}:", ""

    def place(self, number: int) -> str:
        return f"{self.name}:{number}"

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        raise NotImplementedError

    def count(self) -> int:
        return sum(1 for _ in self)

    def fingerprint(self) -> str:
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()

    def _row(self, number: int, value: object) -> Row:
        if not isinstance(value, dict):
            raise DataError(
                f"{self.place(number)}: the row is {_kind(value)}, not an object",
                remedy='Each row must be an object with columns, such as {"prompt": ..., "completion": ...}.',
            )
        return value


@dataclass(frozen=True)
class JsonLines(File):
    """One JSON object per line; blank lines are skipped."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for number, line in numbered_lines(self.path):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise self._broken(number, line, error) from error
            yield number, self._row(number, value)

    def count(self) -> int:
        return sum(1 for line in raw_lines(self.path) if line.strip())

    def _broken(self, number: int, line: str, error: Exception) -> DataError:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        half = not line.endswith("\n")
        return DataError(
            f"{self.place(number)}: broken JSON: {what}" + (" of the last line" if half else ""),
            remedy="The line has no end: the file may be half-written." if half else f"The line: {_shortened(line)}",
        )


@dataclass(frozen=True)
class JsonList(File):
    """One JSON list of objects. A row's number is the line on which it begins."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        text = "".join(line for _, line in numbered_lines(self.path))
        decoder = json.JSONDecoder()
        position, number, counted = self._after(text, 0, "["), 1, 0
        while position < len(text) and text[position] != "]":
            number, counted = number + text.count("\n", counted, position), position
            try:
                value, position = decoder.raw_decode(text, position)
            except (json.JSONDecodeError, RecursionError) as error:
                line = error.lineno if isinstance(error, json.JSONDecodeError) else number
                raise self._broken(line, str(error)) from error
            yield number, self._row(number, value)
            position = _skip_space(text, position)
            if text[position : position + 1] != "]":
                position = self._after(text, position, ",")
        if position >= len(text):
            raise self._broken(1 + text.count("\n"), "the list has no end")

    def _after(self, text: str, position: int, expected: str) -> int:
        position = _skip_space(text, position)
        if text[position : position + 1] != expected:
            got = repr(text[position : position + 1]) if position < len(text) else "the end of the file"
            raise self._broken(1 + text.count("\n", 0, position), f"expected {expected!r}, got {got}")
        return _skip_space(text, position + 1)

    def _broken(self, line: int, what: str) -> DataError:
        return DataError(
            f"{self.place(line)}: broken JSON: {what}",
            remedy="A .json file must hold a list of objects (or one object per line, as .jsonl does).",
        )


@dataclass(frozen=True)
class Csv(File):
    """Comma- or tab-separated, with a header. A row's number is the line on which it begins."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        tab = ".tsv" in self.path.suffixes
        csv.field_size_limit(sys.maxsize)  # its default, 131,072 characters, is shorter than a document
        lines = (line for _, line in numbered_lines(self.path))
        reader = csv.reader(lines, delimiter="\t" if tab else ",", strict=True)
        header: list[str] | None = None
        number = 1
        try:
            for fields in reader:
                if not fields:
                    pass
                elif header is None:
                    header = fields
                else:
                    yield number, self._named(number, header, fields)
                number = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.place(number)}: broken CSV: {error}", remedy="A quote may be left open.") from error

    def _named(self, number: int, header: list[str], fields: list[str]) -> Row:
        if len(fields) != len(header):
            raise DataError(
                f"{self.place(number)}: {len(fields)} fields, the header {len(header)}: {', '.join(header)}",
                remedy='A field that holds a comma or a newline must stand in "quotes".',
            )
        return dict(zip(header, fields, strict=True))


@dataclass(frozen=True)
class Parquet(File):
    """An Apache Parquet file. Rows are numbered from 1."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(self.path).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def count(self) -> int:
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(self.path).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path}: not a readable Parquet file: {str(error).strip().splitlines()[0]}",
            remedy="The file may be half-written or damaged; write it anew.",
        )


def open_file(path: Path) -> File:
    """The rows of a local file, by its name's ending.

    Raises:
        DataError: the ending is none that can be read, or the file is empty or closed to us.
    """
    plain = Path(path.stem) if path.suffix in COMPRESSED else Path(path.name)
    try:
        with open(path, "rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    if empty:
        raise DataError(f"{path}: the file is empty")
    match plain.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLines(path)
        case ".json":
            return JsonList(path) if _begins_list(path) else JsonLines(path)
        case ".csv" | ".tsv":
            return Csv(path)
        case ".parquet" if plain.name == path.name:
            return Parquet(path)
        case suffix:
            raise DataError(
                f"{path}: no reader for {suffix or 'a file without an ending'}",
                remedy="Readable are .jsonl, .json, .csv and .tsv (also as .gz, .bz2, .xz, .zst), .parquet,\n"
                "and folders saved by datasets.",
            )


def _begins_list(path: Path) -> bool:
    try:
        with open_binary(path) as stream:
            return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except (EOFError, OSError) as error:
        raise DataError(f"{path}: can't be read: {error}") from error


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a string"
    return "null" if value is None else f"the {'boolean' if isinstance(value, bool) else 'number'} {value}"


def _shortened(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 80 else line[:77] + "..."
