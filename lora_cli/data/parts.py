"""Tokenized sources as one: laid end to end without copying a token, with the account of all.

Knows arrays, places and counts; knows nothing about how rows were read or tokenized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.account import SourceTally, Tally, account_of
from lora_cli.data.examples import Examples, Joined, PickedPlaces, RowPlaces
from lora_cli.data.mixing import Draw, fingerprint
from lora_cli.data.store import Arrays
from lora_cli.errors import DataError
from lora_cli.plan import DataAccount


@dataclass(frozen=True)
class Part:
    """One source, tokenized."""

    name: str
    around_number: tuple[str, str]
    """What a row's place has before and after its number."""
    weight: float | None
    arrays: Arrays
    tally: Tally
    fingerprint: str

    @property
    def places(self) -> RowPlaces:
        before, after = self.around_number
        return RowPlaces(before, self.arrays["rows"], after)  # type: ignore[arg-type]


def tallies_of(parts: Sequence[Part]) -> list[SourceTally]:
    return [SourceTally(part.tally, part.around_number) for part in parts]


def train_examples(parts: Sequence[Part], *, max_length: int, seed: int) -> Examples:
    """All parts as one, of which each epoch has what the sources' weights draw.

    Raises:
        DataError: some sources have a weight and some have none.
    """
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return _together(parts, max_length=max_length)
    if len(weights) < len(parts):
        raise DataError(
            "data.train: some sources have a weight and some have none",
            remedy="Give every source a weight, or none.",
        )
    draw = Draw(tuple(part.tally.examples for part in parts), tuple(weights), seed)
    return _together(parts, max_length=max_length, draw=draw, warnings=_shares(parts, draw))


def validation_examples(parts: Sequence[Part], train: Sequence[Part], *, max_length: int) -> Examples:
    """All parts as one, compared with what is trained on."""
    return _together(parts, max_length=max_length, warnings=_also_in(train, parts), validation=True)


def _together(
    parts: Sequence[Part],
    *,
    max_length: int,
    draw: Draw | None = None,
    warnings: Sequence[str] = (),
    validation: bool = False,
) -> Examples:
    counts = [part.tally.examples for part in parts]
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
        tallies_of(parts),
        examples,
        max_length=max_length,
        duplicates=_duplicates(parts),
        warnings=warnings,
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


def _shares(parts: Sequence[Part], draw: Draw) -> list[str]:
    """What the weights do to each source, where that is not obvious."""
    edges = np.cumsum([0, *draw.counts])
    picked = draw.epoch(0)
    found = []
    for part, count, start, stop in zip(parts, draw.counts, edges[:-1], edges[1:], strict=True):
        times = int(((picked >= start) & (picked < stop)).sum())
        if times < count:
            found.append(f"{part.name}: its weight leaves {count - times:,} of {count:,} examples out of an epoch")
        elif times > count:
            found.append(f"{part.name}: its weight repeats its examples {times / count:.2f} times an epoch")
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
