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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.config import DataConfig, Source
from lora_cli.data.account import SourceTally, Tally, account_of, refuse_nothing
from lora_cli.data.cache import Cache, Entry, cache_folder, code_version, key_of, tokenizer_fingerprint
from lora_cli.data.chunks import ChunkTokenizer, Job, Progress, collect, in_chunks
from lora_cli.data.examples import Examples, Joined, PickedPlaces, RowPlaces
from lora_cli.data.files import File, Row, Rows
from lora_cli.data.formats import RowReader, find_format
from lora_cli.data.mixing import Draw, fingerprint, held_out
from lora_cli.data.parallel import tokenize_in_parallel, workers_for
from lora_cli.data.sources import open_source
from lora_cli.data.store import Arrays, ArrayStore
from lora_cli.data.tokenizing import Limits
from lora_cli.errors import DataError
from lora_cli.plan import DataAccount

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


@dataclass(frozen=True)
class Part:
    """One source, tokenized."""

    source: OpenSource
    arrays: Arrays
    tally: Tally
    fingerprint: str

    @property
    def places(self) -> RowPlaces:
        before, after = self.source.rows.around_number
        return RowPlaces(before, self.arrays["rows"], after)  # type: ignore[arg-type]


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
    refuse_nothing("data.train", _tallies(train))
    weights = [one.source.weight for one in train_sources]
    train_examples = _together(train, data, weights, seed, _duplicates(train))
    if validation is None:
        return train_examples, None
    refuse_nothing("data.validation", _tallies(validation))
    overlap = _also_in(train, validation)
    return train_examples, _together(validation, data, [None], seed, _duplicates(validation), overlap, validation=True)


def set_chat_template(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the chat template that the config names.

    Raises:
        DataError: the file can't be read.
    """
    if data.chat_template is None:
        return
    path = Path(data.chat_template).expanduser()
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
                    return Part(source, store.close(), tally, store.fingerprint())
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
        return Part(source, entry.arrays, Tally(**entry.meta["tally"]), entry.meta["fingerprint"])

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


def _tallies(parts: Sequence[Part]) -> list[SourceTally]:
    return [SourceTally(part.tally, part.source.rows.around_number) for part in parts]


def _together(
    parts: Sequence[Part],
    data: DataConfig,
    weights: Sequence[float | None],
    seed: int,
    duplicates: Sequence[str],
    warnings: Sequence[str] = (),
    *,
    validation: bool = False,
) -> Examples:
    """All parts as one. No token is copied."""
    counts = tuple(part.tally.examples for part in parts)
    hints = list(warnings)
    draw: Draw | None = None
    if any(weight is not None for weight in weights):
        if any(weight is None for weight in weights):
            raise DataError(
                "data.train: some sources have a weight and some have none",
                remedy="Give every source a weight, or none.",
            )
        draw = Draw(counts, tuple(weight for weight in weights if weight is not None), seed)
        hints += _shares(parts, counts, draw.epoch(0))
    before = np.cumsum([0, *counts])
    examples = Examples(
        input_ids=_joined(parts, "input_ids"),
        trained=_joined(parts, "trained"),
        offsets=np.cumsum([0, *_over_all(parts, "lengths")]),
        places=parts[0].places if len(parts) == 1 else PickedPlaces([p.places for p in parts], np.arange(sum(counts))),
        account=DataAccount(0, 0, 0, 0, 0, 0, 0, 0),
        fingerprint=fingerprint([part.fingerprint for part in parts], draw),
        truncated=np.concatenate(
            [start + part.arrays["truncated"] for start, part in zip(before, parts, strict=False)]
        ),
        draw=draw,
        counts=_over_all(parts, "supervised"),
    )
    account = account_of(
        _tallies(parts),
        examples,
        max_length=data.max_length,
        duplicates=duplicates,
        warnings=hints,
        validation=validation,
    )
    return replace(examples, account=account)


def _joined(parts: Sequence[Part], name: str) -> NDArray[Any] | Joined:
    """A per-token array of all parts; a single part's stays the mapped file that it is."""
    arrays = [part.arrays[name] for part in parts]
    return arrays[0] if len(arrays) == 1 else Joined(arrays)


def _over_all(parts: Sequence[Part], name: str) -> NDArray[np.int64]:
    """A per-example array of all parts."""
    whole: NDArray[np.int64] = np.concatenate([part.arrays[name] for part in parts]).astype(np.int64)
    return whole


def _shares(parts: Sequence[Part], counts: Sequence[int], picked: NDArray[np.int64]) -> list[str]:
    """What the weights do to each source, where that is not obvious."""
    edges = np.cumsum([0, *counts])
    found = []
    for part, count, start, stop in zip(parts, counts, edges[:-1], edges[1:], strict=True):
        times = int(((picked >= start) & (picked < stop)).sum())
        name = part.source.rows.name
        if times < count:
            found.append(f"{name}: its weight leaves {count - times:,} of {count:,} examples out of an epoch")
        elif times > count:
            found.append(f"{name}: its weight repeats its examples {times / count:.2f} times an epoch")
    return found


def _duplicates(parts: Sequence[Part]) -> PickedPlaces:
    """The places of examples that say exactly what an earlier one says."""
    hashes, places = _hashes(parts)
    _, first = np.unique(hashes, return_index=True)
    return PickedPlaces(places, np.setdiff1d(np.arange(len(hashes)), first))


def _also_in(train: Sequence[Part], validation: Sequence[Part]) -> list[str]:
    """A warning of validation examples that are trained on, if there are any."""
    hashes, places = _hashes(validation)
    seen = PickedPlaces(places, np.flatnonzero(np.isin(hashes, _hashes(train)[0])))
    if not seen:
        return []
    what = "1 validation example is" if len(seen) == 1 else f"{len(seen):,} validation examples are"
    return [f"{what} also in train; the first is {seen[0]}"]


def _hashes(parts: Sequence[Part]) -> tuple[NDArray[np.generic], list[RowPlaces]]:
    return np.concatenate([part.arrays["hashes"] for part in parts]), [part.places for part in parts]
