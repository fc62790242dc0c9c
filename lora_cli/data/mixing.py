"""Several sources as one: laid end to end, or drawn by weight; and rows held out for validation.

Weights are shares of an epoch's examples. The epoch is as long as all sources together; a source is repeated
whole as often as its share asks for, and the rest is drawn without replacement. The draw is a function of the
seed and the same in every epoch. Knows arrays only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


def drawn(counts: Sequence[int], weights: Sequence[float], seed: int) -> NDArray[np.int64]:
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
            parts.append(start + np.sort(shuffled(count, seed, _DRAW, number)[:rest]))
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


def fingerprint(parts: Sequence[str], picked: NDArray[np.int64] | None) -> str:
    """A hash of several sources' fingerprints and of what was drawn from them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode())
    if picked is not None:
        digest.update(np.ascontiguousarray(picked, dtype="<i8").data)
    return digest.hexdigest()
