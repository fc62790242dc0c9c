"""Tokenized examples, laid end to end.

The values that the rest of the tool trains and scores on. The arrays may be memory-mapped files. Knows
nothing about where they came from beyond the place of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.order import Drawing
from lora_cli.plan import DataAccount


def _no_indices() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Example:
    """One tokenized example."""

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


class Joined:
    """Arrays laid end to end without copying them; a slice must lie within one of them."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, piece: slice) -> NDArray[Any]:
        part = int(np.searchsorted(self._starts, piece.start, side="right")) - 1
        shift = self._starts[part]
        return self._parts[part][piece.start - shift : piece.stop - shift]


@dataclass(frozen=True)
class Examples:
    """Tokenized rows."""

    input_ids: NDArray[np.int32] | Joined
    """Tokens of all examples."""
    trained: NDArray[np.bool_] | Joined
    """For each of these, whether the token's own prediction counts, which is never so for an example's first."""
    offsets: NDArray[np.int64]
    """[n + 1], tokens before each example."""
    places: Sequence[str]
    """Where each example's row stands: `train.jsonl:17`."""
    account: DataAccount
    fingerprint: str
    """A hash of the content."""
    truncated: NDArray[np.int64] = field(default_factory=_no_indices)
    """Indices of the examples that lost their end."""
    draw: Drawing | None = None
    """Which of the examples each epoch has, where sources have weights; None where it has all."""
    counts: NDArray[np.int64] | None = None
    """[n], trained tokens of each example, where they are known."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        """Trained tokens of each example."""
        if self.counts is not None:
            return self.counts
        return np.array([self.example(index).trained.sum() for index in range(len(self))], dtype=np.int64)

    def example(self, index: int) -> Example:
        start, stop = self.offsets[index], self.offsets[index + 1]
        return Example(self.input_ids[start:stop], self.trained[start:stop])


class RowPlaces(Sequence[str]):
    """The places of a source's rows, spelled when asked for: a million strings would outweigh the tokens."""

    def __init__(self, before: str, numbers: NDArray[np.int64], after: str = "") -> None:
        self._before = before
        self._numbers = numbers
        self._after = after

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> RowPlaces: ...

    def __getitem__(self, index: int | slice) -> str | RowPlaces:
        if isinstance(index, slice):
            return RowPlaces(self._before, self._numbers[index], self._after)
        return f"{self._before}{self._numbers[index]}{self._after}"


class PickedPlaces(Sequence[str]):
    """Places picked from those of several sources, by one index over all of them."""

    def __init__(self, parts: Sequence[Sequence[str]], picked: NDArray[np.int64]) -> None:
        self._parts = parts
        self._picked = picked
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> PickedPlaces: ...

    def __getitem__(self, index: int | slice) -> str | PickedPlaces:
        if isinstance(index, slice):
            return PickedPlaces(self._parts, self._picked[index])
        chosen = int(self._picked[index])
        part = int(np.searchsorted(self._starts, chosen, side="right")) - 1
        return self._parts[part][chosen - int(self._starts[part])]
