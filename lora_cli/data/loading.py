"""A config's data as tokenized train and validation examples.

Knows how sources, tokenization, cache, mixing and the account fit together, and how none of them works.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_cli.config import DataConfig, Source
from lora_cli.data.account import Tally, refuse_nothing
from lora_cli.data.cache import Cache, Entry, cache_folder, code_version, key_of, tokenizer_fingerprint
from lora_cli.data.chunks import ChunkTokenizer, Job, Progress, collect, in_chunks
from lora_cli.data.examples import Examples
from lora_cli.data.files import File, Row, Rows
from lora_cli.data.formats import RowReader, find_format
from lora_cli.data.mixing import held_out
from lora_cli.data.parallel import tokenize_in_parallel, workers_for
from lora_cli.data.parts import Part, tallies_of, train_examples, validation_examples
from lora_cli.data.sources import open_source
from lora_cli.data.store import Arrays, ArrayStore
from lora_cli.data.tokenizing import Limits
from lora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenSource:
    """A source and its rows."""

    source: Source
    rows: Rows

    def reader(self, data: DataConfig) -> RowReader:
        """How its rows are to be read, as the config says or the first row shows.

        Raises:
            DataError: it has no rows, or the first fits no format.
        """
        columns = self.source.columns if self.source.columns is not None else data.columns
        wanted = self.source.format if self.source.format is not None else data.format
        if wanted == "auto":
            first = next(iter(self.rows), None)
            if first is None:
                raise DataError(f"{self.rows.name}: there are no rows")
            wanted = find_format(self.place(first[0]), first[1], columns or {})
        return RowReader(wanted, columns or {}, answers_needed=data.train_on == "assistant")

    def place(self, number: int) -> str:
        before, after = self.rows.around_number
        return f"{before}{number}{after}"

    def placed_rows(self, wanted: NDArray[np.bool_] | None) -> Iterator[tuple[int, str, Row]]:
        """The wanted rows, or all, each with number and place."""
        for index, (number, row) in enumerate(self.rows):
            if wanted is None or wanted[index]:
                yield number, self.place(number), row


def load_examples(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Examples, Examples | None]:
    """The train examples, and the validation examples if there are any.

    Sets the tokenizer's chat template where the config gives one.

    Raises:
        DataError: a source, a row or the template can't be used, or no row is left.
    """
    set_chat_template(data, tokenizer)
    loader = _Loader(data, tokenizer, stop_token_ids, progress)
    train_sources = open_sources(data.train)
    validation: list[Part] | None = None
    if isinstance(data.validation, float):
        held = _hold_out(train_sources, data.validation, seed)
        train = loader.parts(train_sources, [~flags for flags in held])
        validation = loader.parts(train_sources, held)
    else:
        train = loader.parts(train_sources)
        if data.validation is not None:
            validation = loader.parts(open_sources(data.validation))
    refuse_nothing("data.train", tallies_of(train))
    examples = train_examples(train, max_length=data.max_length, seed=seed)
    if validation is None:
        return examples, None
    refuse_nothing("data.validation", tallies_of(validation))
    return examples, validation_examples(validation, train, max_length=data.max_length)


def set_chat_template(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the chat template that the config names.

    Raises:
        DataError: the file can't be read.
    """
    if data.chat_template is None:
        return
    path = Path(data.chat_template).expanduser()
    if path.exists() and not path.is_file():
        raise DataError(f"data.chat_template: {path.absolute()} is not a file", remedy="Name the file itself.")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template: {path.absolute()} can't be read: {error}",
            remedy="It must be a text file with a Jinja template.",
        ) from error


def open_sources(sources: Sequence[Source]) -> list[OpenSource]:
    """Open all, and make sure that no two are called the same in messages."""
    opened = [OpenSource(source, open_source(source)) for source in sources]
    counts = Counter(one.rows.name for one in opened)
    return [
        replace(one, rows=replace(one.rows, label=str(one.rows.path)))
        if counts[one.rows.name] > 1 and isinstance(one.rows, File)
        else one
        for one in opened
    ]


class _Loader:
    """Tokenizes sources, or finds them in the cache."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: frozenset[int],
        progress: Progress | None,
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._stops = stop_token_ids
        self._progress = progress
        self._cache = Cache(cache_folder()) if data.cache else None
        self._tokenizer_key = tokenizer_fingerprint(tokenizer) if data.cache else ""

    def parts(self, sources: Sequence[OpenSource], wanted: Sequence[NDArray[np.bool_]] | None = None) -> list[Part]:
        flags: Sequence[NDArray[np.bool_] | None] = [None] * len(sources) if wanted is None else wanted
        return [self._part(source, one) for source, one in zip(sources, flags, strict=True)]

    def _part(self, source: OpenSource, wanted: NDArray[np.bool_] | None) -> Part:
        if self._cache is None:
            # The mapped files outlive their folder, until nobody looks at them any more.
            with tempfile.TemporaryDirectory(prefix="lora-") as folder:
                store = ArrayStore(Path(folder))
                try:
                    tally = self._tokenize(source, wanted, store)
                    return _part(source, store.close(), tally, store.fingerprint())
                finally:
                    store.discard()
        key = self._key(source, wanted)
        entry = self._cache.find(key)
        if entry is None:
            try:
                entry = self._write_entry(self._cache, key, source, wanted)
            except OSError as error:
                raise DataError(
                    f"{self._cache.folder}: tokenized data can't be kept here: {error.strerror}",
                    remedy="Name another folder in the environment as LORA_CACHE_DIR, or set data.cache: false.",
                ) from error
        return _part(source, entry.arrays, Tally(**entry.meta["tally"]), entry.meta["fingerprint"])

    def _write_entry(self, cache: Cache, key: str, source: OpenSource, wanted: NDArray[np.bool_] | None) -> Entry:
        folder = cache.begin()
        store = ArrayStore(folder)
        try:
            tally = self._tokenize(source, wanted, store)
            store.close()
            return cache.complete(folder, key, {"tally": asdict(tally), "fingerprint": store.fingerprint()})
        finally:
            store.discard()
            shutil.rmtree(folder, ignore_errors=True)

    def _tokenize(self, source: OpenSource, wanted: NDArray[np.bool_] | None, store: ArrayStore) -> Tally:
        data = self._data
        job = Job(
            self._tokenizer,
            self._stops,
            Limits(data.max_length, data.overlong),
            everything=data.train_on == "all",
            reader=source.reader(data),
        )
        what = f"tokenizing {source.rows.name}"
        total = source.rows.count() if wanted is None else int(wanted.sum())

        def report(done: int) -> None:
            if self._progress is not None:
                self._progress(what, done, total)

        report(0)
        chunks, workers = in_chunks(source.placed_rows(wanted)), workers_for(total)
        if workers > 1:
            return collect(tokenize_in_parallel(chunks, job, workers), store, report)
        return collect(map(ChunkTokenizer(job).tokenize, chunks), store, report)

    def _key(self, source: OpenSource, wanted: NDArray[np.bool_] | None) -> str:
        data = self._data
        return key_of(
            {
                "rows": source.rows.fingerprint(),
                "kind": type(source.rows).__name__,
                "wanted": None if wanted is None else np.packbits(wanted).tobytes().hex(),
                "tokenizer": self._tokenizer_key,
                "stops": sorted(self._stops),
                "format": source.source.format or data.format,
                "columns": source.source.columns if source.source.columns is not None else data.columns,
                "max_length": data.max_length,
                "overlong": data.overlong,
                "train_on": data.train_on,
                "code": code_version(),
            }
        )


def _hold_out(sources: Sequence[OpenSource], fraction: float, seed: int) -> list[NDArray[np.bool_]]:
    counts = [one.rows.count() for one in sources]
    if sum(counts) < 2:
        raise DataError(
            f"data.validation: {sum(counts)} row can't be divided into train and validation",
            remedy="Set data.validation to null, or give more rows.",
        )
    flags = held_out(sum(counts), fraction, seed)
    return np.split(flags, np.cumsum(counts)[:-1])


def _part(source: OpenSource, arrays: Arrays, tally: Tally, fingerprint: str) -> Part:
    rows = source.rows
    return Part(rows.name, rows.around_number, source.source.weight, arrays, tally, fingerprint)
