"""The shards of a merged model while they are written, by several threads and in any order.

A file is opened when the first of its tensors comes, flushed now and then, and closed when it is whole. Knows nothing
about what the tensors mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from torch import Tensor

from lora_cli.merge.shards import ShardFile, Slot, StoredTensor

_FLUSH_EVERY = 128 * 2**20
"""Bytes after which a flush begins, so that the last one finds little left to do."""


class Output:
    """The shards in `folder`: each file's slots by its name."""

    def __init__(self, folder: Path, shards: Mapping[str, Sequence[Slot]]) -> None:
        self._folder = folder
        self._slots = shards
        self._home = {slot.name: name for name, slots in shards.items() for slot in slots}
        self._left = {slot.name: slot.num_bytes for slots in shards.values() for slot in slots}
        self._missing = {name: sum(slot.num_bytes for slot in slots) for name, slots in shards.items()}
        self._unflushed = 0
        self._open: dict[str, ShardFile] = {}
        self._lock = Lock()
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushes: list[Future[None]] = []

    def __enter__(self) -> Output:
        return self

    def write(self, name: str, data: Tensor, at: int = 0) -> None:
        """A tensor, or the part of it that begins `at` bytes into it."""
        self._wrote(name, self._file(name).write(name, data, at))

    def copy(self, source: StoredTensor) -> None:
        """A tensor as it lies in another file."""
        self._wrote(source.name, self._file(source.name).copy(source))

    def _file(self, name: str) -> ShardFile:
        home = self._home[name]
        with self._lock:
            if home not in self._open:
                self._open[home] = ShardFile(self._folder / home, self._slots[home])
            return self._open[home]

    def _wrote(self, name: str, count: int) -> None:
        home = self._home[name]
        with self._lock:
            self._left[name] -= count
            self._missing[home] -= count
            self._unflushed += count
            if count and self._missing[home] == 0:
                self._flushes.append(self._flusher.submit(self._open[home].close))
            elif self._unflushed >= _FLUSH_EVERY:
                self._flushes.append(self._flusher.submit(os.fdatasync, self._open[home].descriptor))
            else:
                return
            self._unflushed = 0

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                for slots in self._slots.values():  # one of nothing but empty tensors is not there yet
                    self._file(slots[0].name)
                for flush in self._flushes:
                    flush.result()
                unwritten = [name for name, left in self._left.items() if left]
                assert not unwritten, f"{len(unwritten)} tensors were not written once, the first {unwritten[0]}"
        finally:
            self._flusher.shutdown(cancel_futures=kind is not None)
            for file in self._open.values():
                file.close()
