"""A source's rows in chunks to arrays of tokens, with the tally of every row.

Memory is bounded by a few chunks, whatever the size of the source. A chunk is a value that depends on its rows and
the job alone, so that it is the same in whichever process it was made. Knows nothing about several sources or caches.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from lora_cli.data.account import Tally
from lora_cli.data.examples import Example
from lora_cli.data.formats import RowReader
from lora_cli.data.store import Arrays, ArrayStore
from lora_cli.data.tokenizing import Limits, PlacedRow, Prepared, PreparedRow, RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int | None], None]
"""(what, rows done, rows in all where known)"""

CHUNK_ROWS = 1000


@dataclass(frozen=True)
class Job:
    """What is done to every row of a source."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    limits: Limits
    everything: bool
    reader: RowReader


@dataclass(frozen=True)
class Chunk:
    """Some rows, tokenized."""

    tally: Tally
    arrays: Arrays


class ChunkTokenizer:
    """Does a job, chunk by chunk."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = RowTokenizer(job.tokenizer, job.stop_token_ids, limits=job.limits, everything=job.everything)

    def tokenize(self, rows: list[PlacedRow]) -> Chunk:
        """The rows' examples.

        Raises:
            DataError: a row can't be used as it is.
        """
        tally = Tally()
        kept: list[tuple[int, Example]] = []
        truncated: list[int] = []
        with _no_collection():
            for row in self._tokenizer.prepare(rows, self._job.reader):
                for one in _count(tally, row, self._job.stop_token_ids):
                    if one.truncated:
                        truncated.append(tally.examples)
                    tally.examples += 1
                    kept.append((row.number, one.example))
        tally.notes = self._tokenizer.notes
        return Chunk(tally, _arrays(kept, truncated))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within it, nobody looks for garbage: every token's offsets are a tuple, and the search takes a seventh of all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_chunks(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


def collect(chunks: Iterable[Chunk], store: ArrayStore, progress: Callable[[int], None]) -> Tally:
    """Put chunks into a store, in their order; the tally of all."""
    whole = Tally()
    for chunk in chunks:
        shifted = {**chunk.arrays, "truncated": chunk.arrays["truncated"] + whole.examples}
        store.append(shifted)
        whole.add(chunk.tally)
        progress(whole.rows)
    return whole


def _count(tally: Tally, row: PreparedRow, stop_token_ids: frozenset[int]) -> Iterator[Prepared]:
    """The row's examples that are used, after the tally has counted the row."""
    tally.rows += 1
    longest = max((one.length_seen for one in row.examples), default=0)
    if longest > tally.longest_seen:
        tally.longest_seen, tally.longest_row = longest, row.number
    if row.dropped is not None:
        tally.dropped.setdefault(row.dropped, []).append(row.number)
        return
    tally.used += 1
    if row.spells_controls:
        tally.spelled_controls.append(row.number)
    used = [one for one in row.examples if one.dropped is None]
    tally.lost_turns += len(row.examples) - len(used)
    if any(one.truncated for one in used):
        tally.truncated.append(row.number)
    for one in used:
        if not one.truncated:
            tally.whole += 1
            last_trained = one.example.input_ids[np.flatnonzero(one.example.trained)[-1]]
            tally.stopping += int(last_trained) in stop_token_ids
        yield one


def _arrays(kept: list[tuple[int, Example]], truncated: list[int]) -> Arrays:
    examples = [example for _, example in kept]
    hashes = [hashlib.blake2b(example.input_ids.tobytes(), digest_size=8).digest() for example in examples]
    none = np.zeros(0, dtype=np.int32)
    return {
        "input_ids": np.concatenate([none, *(example.input_ids for example in examples)]),
        "trained": np.concatenate([none.astype(np.bool_), *(example.trained for example in examples)]),
        "lengths": np.array([len(example.input_ids) for example in examples], dtype=np.int64),
        "supervised": np.array([example.trained.sum() for example in examples], dtype=np.int64),
        "rows": np.array([number for number, _ in kept], dtype=np.int64),
        "hashes": np.frombuffer(b"".join(hashes), dtype="<u8"),
        "truncated": np.array(truncated, dtype=np.int64),
    }
