"""How examples are laid into micro-batches, and divided among ranks.

Both change memory and speed and never the result. Deterministic: ties go to the lower index, so every process
computes the same answer. Knows lengths only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Bins of at most `micro_batch_tokens` tokens; an example longer than that has a bin for itself.

    As few bins as best-fit decreasing finds, then filled evenly where that stays within the bound: the peak
    memory of a step is set by its fullest micro-batch.
    """
    alone = [[index] for index, length in enumerate(lengths) if length > micro_batch_tokens]
    rest = [index for index, length in enumerate(lengths) if length <= micro_batch_tokens]
    bins = _best_fit(lengths, rest, micro_batch_tokens)
    even = _spread(lengths, rest, len(bins))
    if all(sum(int(lengths[index]) for index in one) <= micro_batch_tokens for one in even):
        bins = even
    return sorted([sorted(one) for one in alone + bins if one])


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """One list of examples per rank, with about as many tokens each; a rank may get none."""
    return [sorted(one) for one in _spread(lengths, range(len(lengths)), ranks)]


def _longest_first(lengths: Sequence[int], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-int(lengths[index]), index))


def _best_fit(lengths: Sequence[int], indices: Sequence[int], bound: int) -> list[list[int]]:
    """Each example, longest first, into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in _longest_first(lengths, indices):
        length = int(lengths[index])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([index])
            insort(room, (bound - length, len(bins) - 1))
            continue
        left, chosen = room.pop(place)
        bins[chosen].append(index)
        insort(room, (left - length, chosen))
    return bins


def _spread(lengths: Sequence[int], indices: Sequence[int], count: int) -> list[list[int]]:
    """Each example, longest first, into the emptiest of `count` bins."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, chosen) for chosen in range(count)]
    for index in _longest_first(lengths, indices):
        load, chosen = heapq.heappop(loads)
        bins[chosen].append(index)
        heapq.heappush(loads, (load + int(lengths[index]), chosen))
    return bins
