"""The account of every row, from the tallies of the sources.

Knows counts and words for them; knows nothing about how rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.errors import DataError
from lora_cli.plan import DataAccount

_FEW_PERCENT = 1.0
FEW_PLACES = 20


@dataclass
class Tally:
    """What became of one source's rows. Plain values, so that the cache can keep it as JSON."""

    rows: int = 0
    used: int = 0
    truncated: list[int] = field(default_factory=list)
    """Rows that lose their end."""
    longest_seen: int = 0
    longest_row: int = 0
    """Which row that is."""
    examples: int = 0
    whole: int = 0
    """Examples that kept their end."""
    stopping: int = 0
    """Of these, those that end in a trained stop token."""
    lost_turns: int = 0
    """Examples dropped from rows of which others are used."""
    spelled_controls: list[int] = field(default_factory=list)
    """Rows that spell a control token."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason to row numbers."""
    notes: dict[str, str] = field(default_factory=dict)
    """What was found out about the chat template."""

    def add(self, more: Tally) -> None:
        """Count what was counted elsewhere, of rows that follow these."""
        if more.longest_seen > self.longest_seen:
            self.longest_seen, self.longest_row = more.longest_seen, more.longest_row
        for name in ("rows", "used", "examples", "whole", "stopping", "lost_turns"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.truncated += more.truncated
        self.spelled_controls += more.spelled_controls
        for reason, numbers in more.dropped.items():
            self.dropped.setdefault(reason, []).extend(numbers)
        self.notes |= more.notes


@dataclass(frozen=True)
class SourceTally:
    """A tally with what its row numbers stand for."""

    tally: Tally
    around_number: tuple[str, str]

    def place(self, number: int) -> str:
        before, after = self.around_number
        return f"{before}{number}{after}"


def account_of(
    sources: Sequence[SourceTally],
    examples: Examples,
    *,
    max_length: int,
    duplicates: Sequence[str] = (),
    warnings: Sequence[str] = (),
    validation: bool = False,
) -> DataAccount:
    """The account of all sources together; tokens are those of an epoch, the first where weights draw."""
    tallies = [source.tally for source in sources]
    reasons: dict[str, tuple[str, ...]] = {}
    for source in sources:
        for reason, numbers in source.tally.dropped.items():
            reasons[reason] = reasons.get(reason, ()) + tuple(source.place(number) for number in numbers)
    epoch = slice(None) if examples.draw is None else examples.draw.epoch(0)
    tokens, supervised = int(examples.lengths[epoch].sum()), int(examples.supervised[epoch].sum())
    longest = max(sources, key=lambda source: source.tally.longest_seen)
    found = [*_warnings(sources, max_length, tokens, supervised), *_repeated(duplicates)]
    truncated = [source.place(number) for source in sources for number in source.tally.truncated[:FEW_PLACES]]
    return DataAccount(
        rows=sum(tally.rows for tally in tallies),
        used=sum(tally.used for tally in tallies),
        truncated=sum(len(tally.truncated) for tally in tallies),
        dropped=sum(len(places) for places in reasons.values()),
        num_tokens=tokens,
        num_supervised_tokens=supervised,
        longest=int(examples.lengths.max(initial=0)),
        longest_seen=longest.tally.longest_seen,
        reasons=reasons,
        warnings=(
            *(f"{'validation: ' if validation else ''}{counted}" for counted in found),
            *warnings,
            *dict.fromkeys(text for tally in tallies for text in tally.notes.values()),
        ),
        longest_place=longest.place(longest.tally.longest_row) if longest.tally.longest_seen else None,
        truncated_places=tuple(truncated[:FEW_PLACES]),
        duplicates=len(duplicates),
        duplicate_places=tuple(duplicates[:FEW_PLACES]),
        lengths=histogram(examples.lengths),
    )


def histogram(lengths: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """(most tokens, how many examples) in bins that double, from the shortest example's to the longest's."""
    if len(lengths) == 0:
        return ()
    exponents = np.ceil(np.log2(np.maximum(lengths, 2))).astype(np.int64)
    first, last = int(exponents.min()), int(exponents.max())
    bins = [(2**exponent, int((exponents == exponent).sum())) for exponent in range(first, last + 1)]
    # The last bin ends where the longest example does.
    return (*bins[:-1], (int(lengths.max()), bins[-1][1]))


def refuse_nothing(name: str, sources: Sequence[SourceTally]) -> None:
    """Refuse sources of which no row is left.

    Raises:
        DataError: with what became of the rows.
    """
    if any(source.tally.used for source in sources):
        return
    reasons = []
    for source in sources:
        for reason, numbers in source.tally.dropped.items():
            first = ", ".join(source.place(number) for number in numbers[:3])
            reasons.append(f"{len(numbers):,} dropped, {reason}: {first}{', ...' if len(numbers) > 3 else ''}")
    rows = sum(source.tally.rows for source in sources)
    if rows == 0:
        raise DataError(f"{name}: there are no rows")
    raise DataError(f"{name}: none of the {rows:,} rows can be trained on", remedy="\n".join(reasons))


def _warnings(sources: Sequence[SourceTally], max_length: int, tokens: int, supervised: int) -> list[str]:
    tallies = [source.tally for source in sources]
    found = []
    truncated, used = sum(len(tally.truncated) for tally in tallies), sum(tally.used for tally in tallies)
    if truncated:
        longest = max(tally.longest_seen for tally in tallies)
        lost = f"all {truncated:,} rows lose" if truncated == used else f"{truncated:,} rows lose"
        if truncated == 1:
            lost = "1 row loses"
        found.append(f"{lost} the end at data.max_length {max_length}; {_round_up(longest)} keeps all")
    whole, stopping = sum(tally.whole for tally in tallies), sum(tally.stopping for tally in tallies)
    if whole and not stopping:
        found.append("no example ends in a trained stop token: the model won't learn to end by itself")
    elif stopping < whole:
        found.append(f"{whole - stopping:,} of {whole:,} examples end in no trained stop token")
    lost_turns = sum(tally.lost_turns for tally in tallies)
    if lost_turns:
        found.append(f"{lost_turns:,} turns were dropped from rows whose other turns are used")
    if tokens and 100.0 * supervised / tokens < _FEW_PERCENT:
        found.append(f"only {100.0 * supervised / tokens:.2f} % of the tokens are trained")
    spelled = [source.place(number) for source in sources for number in source.tally.spelled_controls]
    if spelled:
        what = "1 row spells" if len(spelled) == 1 else f"{len(spelled):,} rows spell"
        found.append(f"{what} control tokens, kept as plain text; the first is {spelled[0]}")
    return found


def _repeated(duplicates: Sequence[str]) -> list[str]:
    if not duplicates:
        return []
    count = len(duplicates)
    what = (
        "1 example is an exact duplicate; it" if count == 1 else f"{count:,} examples are exact duplicates; the first"
    )
    return [f"{what} is {duplicates[0]}"]


def _round_up(length: int) -> int:
    """To a multiple of 64, a size that people would write."""
    return -(-length // 64) * 64
