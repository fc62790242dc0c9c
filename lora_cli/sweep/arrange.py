"""Which rows of which members go through the model together.

Members that see the same rows sit side by side with equal tokens; members with rows of their own fill micro-batches
as documents of one run do. Either way a micro-batch holds at most `micro_batch_tokens` tokens, of whichever members.
Deterministic. Knows lengths only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from lora_cli.data.packing import pack


@dataclass(frozen=True)
class Wish:
    """The rows that one member wants to see now."""

    member: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each."""
    data: Hashable
    """Equal where row numbers mean the same rows."""


@dataclass(frozen=True)
class Seat:
    """One member's rows in a micro-batch."""

    member: int
    rows: tuple[int, ...]


MicroBatch = tuple[Seat, ...]
Grouping = Callable[[Sequence[int], int], list[list[int]]]
"""Lengths and a bound, to indices by micro-batch: `Computation.micro_batches`."""


def arrange(
    wishes: Sequence[Wish], micro_batch_tokens: int, *, group: Grouping = pack, alone: bool = False
) -> list[MicroBatch]:
    """Micro-batches that hold each row of each wish once.

    Args:
        group: how rows of one member are laid into micro-batches.
        alone: one row at a time, of one member: for models that don't keep documents apart.
    """
    alike: dict[Hashable, list[Wish]] = {}
    for wish in wishes:
        alike.setdefault((wish.data, wish.rows), []).append(wish)
    found: list[MicroBatch] = []
    single = [same[0] for same in alike.values() if len(same) == 1 or alone]
    for same in alike.values():
        if alone:
            found += [(Seat(wish.member, (row,)),) for wish in same for row in wish.rows]
        elif len(same) > 1:
            found += _side_by_side(same, micro_batch_tokens, group)
    return found if alone else found + _mixed(single, micro_batch_tokens, group)


def _side_by_side(same: Sequence[Wish], micro_batch_tokens: int, group: Grouping) -> list[MicroBatch]:
    """As many members as the longest row leaves room for, in blocks of about one size, over the same rows."""
    rows, lengths = same[0].rows, same[0].lengths
    if not rows:
        return []
    together = min(len(same), max(1, micro_batch_tokens // max(lengths)))
    blocks = -(-len(same) // together)
    found: list[MicroBatch] = []
    for number in range(blocks):
        block = same[number * len(same) // blocks : (number + 1) * len(same) // blocks]
        for indices in group(lengths, max(1, micro_batch_tokens // len(block))):
            chosen = tuple(rows[i] for i in indices)
            found.append(tuple(Seat(wish.member, chosen) for wish in block))
    return found


def _mixed(wishes: Sequence[Wish], micro_batch_tokens: int, group: Grouping) -> list[MicroBatch]:
    """Rows of different members, as they fit."""
    documents = [(wish.member, row) for wish in wishes for row in wish.rows]
    lengths = [length for wish in wishes for length in wish.lengths]
    found: list[MicroBatch] = []
    for indices in group(lengths, micro_batch_tokens) if documents else ():
        seats: dict[int, list[int]] = {}
        for index in sorted(indices):
            member, row = documents[index]
            seats.setdefault(member, []).append(row)
        found.append(tuple(Seat(member, tuple(rows)) for member, rows in seats.items()))
    return found
