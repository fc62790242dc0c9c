"""Several sources as one: laid end to end, or drawn by weight; and rows held out for validation.

Weights are shares of an epoch's examples. The epoch is as long as all sources together; a source is repeated
whole as often as its share asks for, and the rest is drawn without replacement, from what earlier epochs have left
as long as that is enough. The draw is a function of seed and epoch. Knows arrays only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.order import shuffled

_HOLD_OUT, _DRAW = 1, 2  # what a permutation is for, so that no two uses see the same one


def held_out(count: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of `count` rows are for validation: at least one is, and at least one is not."""
    chosen = min(max(1, round(count * fraction)), count - 1)
    flags = np.zeros(count, dtype=np.bool_)
    flags[shuffled(count, seed, _HOLD_OUT)[:chosen]] = True
    return flags


@dataclass(frozen=True)
class Draw:
    """Which examples an epoch has, as the weights say."""

    counts: tuple[int, ...]
    """Examples of each source."""
    weights: tuple[float, ...]
    seed: int

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Indices over all sources laid end to end; epochs count from 0. Read-only, as they are shared."""
        return _drawn(self, epoch)


@lru_cache(maxsize=4)
def _drawn(draw: Draw, epoch: int) -> NDArray[np.int64]:
    picked = drawn(draw.counts, draw.weights, draw.seed, epoch)
    picked.flags.writeable = False
    return picked


def drawn(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Indices over all sources laid end to end, with each source's share as its weight says."""
    total = sum(counts)
    present = [weight if count else 0.0 for count, weight in zip(counts, weights, strict=True)]
    shares = _whole_shares(total, present)
    parts = []
    start = 0
    for number, (count, wanted) in enumerate(zip(counts, shares, strict=True)):
        if wanted:
            repeats, rest = divmod(wanted, count)
            order = np.arange(count, dtype=np.int64)
            parts += [start + order] * repeats
            # An order of the source serves as many epochs as it has room for, each with a piece of its own.
            cycle, piece = divmod(epoch, count // rest) if rest else (0, 0)
            some = shuffled(count, seed, _DRAW, number, cycle)[piece * rest : (piece + 1) * rest]
            parts.append(start + np.sort(some))
        start += count
    return np.concatenate(parts)


def _whole_shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by weight into whole numbers, the largest remainders rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def fingerprint(parts: Sequence[str], draw: Draw | None) -> str:
    """A hash of several sources' fingerprints and of what is drawn from them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode())
    if draw is not None:
        digest.update(np.ascontiguousarray(draw.epoch(0), dtype="<i8").data)
    return digest.hexdigest()
