"""Examples being collected, and the arrays they end up in: files that are mapped.

Knows arrays and files; knows nothing about rows' meaning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]

# What is kept of each example, and of each token.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "input_ids": np.dtype("<i4"),
    "trained": np.dtype("?"),
    "lengths": np.dtype("<i8"),
    "supervised": np.dtype("<i8"),
    "rows": np.dtype("<i8"),
    "hashes": np.dtype("<u8"),
    "truncated": np.dtype("<i8"),
}


class ArrayStore:
    """Appends to named arrays, which grow on disk, so that memory stays bounded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in DTYPES}
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.bin").open("wb") for name in DTYPES}

    def append(self, chunk: Mapping[str, NDArray[np.generic]]) -> None:
        for name, values in chunk.items():
            block = np.ascontiguousarray(values, dtype=DTYPES[name])
            self._digests[name].update(block.data)
            self._files[name].write(block.data)

    def fingerprint(self) -> str:
        """A hash of what makes the examples: ids, flags and lengths."""
        together = b"".join(self._digests[name].digest() for name in ("input_ids", "trained", "lengths"))
        return hashlib.blake2b(together, digest_size=16).hexdigest()

    def close(self) -> Arrays:
        """All that was appended, mapped."""
        self.discard()
        return map_arrays(self._folder)

    def discard(self) -> None:
        for stream in self._files.values():
            stream.close()


def map_arrays(folder: Path) -> Arrays:
    """The arrays of a folder, mapped."""
    arrays: Arrays = {}
    for name, dtype in DTYPES.items():
        path = folder / f"{name}.bin"
        # An empty file can't be mapped.
        arrays[name] = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
    return arrays
