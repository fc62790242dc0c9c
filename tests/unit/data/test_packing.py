"""Micro-batches and shares of ranks."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.packing import pack, share

lengths_of = st.lists(st.integers(1, 300), max_size=60)


@given(lengths_of, st.integers(1, 400))
def test_every_example_is_in_one_bin_within_the_bound(lengths: list[int], bound: int) -> None:
    bins = pack(lengths, bound)
    assert sorted(chain.from_iterable(bins)) == list(range(len(lengths)))
    assert all(bins)
    assert all(sum(lengths[i] for i in one) <= bound or len(one) == 1 for one in bins)


@given(lengths_of, st.integers(1, 400))
def test_bins_are_few(lengths: list[int], bound: int) -> None:
    """Best-fit decreasing needs at most 11/9 of the optimum and one more; total size bounds the optimum below."""
    fitting = [length for length in lengths if length <= bound]
    # Any two bins of a best fit hold more than one bin's worth.
    assert len(pack(lengths, bound)) - (len(lengths) - len(fitting)) <= 2 * sum(fitting) / bound + 1


def test_a_packing_that_needs_thought() -> None:
    """Longest first: in the order given, the 2 and the 3 would leave no room for the 8 and the 7."""
    assert pack([2, 3, 8, 7], 10) == [[0, 2], [1, 3]]


def test_bins_are_even() -> None:
    """The fullest bin sets the peak memory: 4 + 4 + 4 and 4 + 4 rather than a full one and a rest."""
    sizes = sorted(len(one) for one in pack([4] * 6, 16))
    assert sizes == [3, 3]


def test_an_example_over_the_bound_runs_alone() -> None:
    assert pack([5, 50, 5], 10) == [[0, 2], [1]]


def test_numpy_lengths_give_the_same_bins() -> None:
    lengths = [7, 3, 9, 2, 8, 8, 1]
    assert pack(np.array(lengths, dtype=np.int64), 12) == pack(lengths, 12)  # type: ignore[arg-type]
    assert share(np.array(lengths, dtype=np.int64), 3) == share(lengths, 3)  # type: ignore[arg-type]


@given(lengths_of, st.integers(1, 9))
def test_shares_hold_every_example_and_are_balanced(lengths: list[int], ranks: int) -> None:
    shares = share(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(chain.from_iterable(shares)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in one) for one in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_golden_shares() -> None:
    """Every process must compute the same."""
    assert share([5, 5, 4, 3, 3, 1], 2) == [[0, 2, 5], [1, 3, 4]]
