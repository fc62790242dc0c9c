"""Which examples each step sees: a pure function of seed, epoch and step.

No state and no library's random generator: the same numbers on every machine and numpy version, for any
number of processes and any micro-batch size, so that a resumed run needs no replay. Knows nothing about what
an example is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of the SplitMix64 generator: a bijection of 64-bit words that scatters them evenly."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def shuffled(count: int, *keys: int) -> NDArray[np.int64]:
    """A permutation of `range(count)` that depends on the keys and on nothing else."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = splitmix64(state ^ np.array([key & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64))
    hashes = splitmix64(state ^ splitmix64(np.arange(count, dtype=np.uint64)))
    # `stable` settles ties between equal hashes by index, whatever sort numpy uses.
    return np.argsort(hashes, kind="stable").astype(np.int64)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of `count` examples in an epoch (epochs count from 0). Read-only, as it is shared."""
    order = shuffled(count, seed, epoch)
    order.flags.writeable = False
    return order


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps that see every example once; the last may be short."""
    return -(-count // batch_size)


class Drawing(Protocol):
    """What picks an epoch's examples where sources have weights."""

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """As many indices as there are examples."""


def step_examples(
    step: int, *, seed: int, count: int, batch_size: int, draw: Drawing | None = None
) -> NDArray[np.int64]:
    """The examples of a step. Steps count from 1, over all epochs."""
    epoch, place = divmod(step - 1, steps_per_epoch(count, batch_size))
    chosen = epoch_order(seed, epoch, count)[place * batch_size : (place + 1) * batch_size]
    return chosen if draw is None else draw.epoch(epoch)[chosen]
