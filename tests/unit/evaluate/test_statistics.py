"""Figures, intervals and the sign test, against brute force and against what they claim."""

from __future__ import annotations

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.evaluate.statistics import (
    Ratio,
    compare,
    paired_share_interval,
    perplexity,
    sign_test,
    student_quantile,
)
from lora_cli.report.comparison import Measure


def one(base, adapter, per, seed=0):
    [measure] = compare([Ratio("loss", *(np.array(x, dtype=float) for x in (base, adapter, per)))], seed=seed)
    return measure


def test_a_figure_is_weighted_by_tokens_not_by_rows():
    measure = one([10.0, 1.0], [5.0, 2.0], [10, 1])
    assert (measure.base, measure.adapter, measure.difference) == pytest.approx((1.0, 7 / 11, -4 / 11))


def test_equal_rows_differ_by_exactly_zero():
    losses = np.random.default_rng(0).gamma(2, 3, 40)
    measure = one(losses, losses, np.arange(1, 41))
    assert (measure.difference, measure.low, measure.high) == (0.0, 0.0, 0.0)


def test_rows_are_drawn_in_pairs():
    # The rows differ wildly from each other, base and adapter by the same for each: unpaired draws would see noise.
    base = np.random.default_rng(0).uniform(0, 1000, 50)
    measure = one(base, base - 0.5, np.ones(50))
    assert measure.low == pytest.approx(-0.5)
    assert measure.high == pytest.approx(-0.5)


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(1)
    columns = rng.gamma(2, 3, 30), rng.gamma(2, 3, 30), rng.integers(1, 20, 30)
    assert one(*columns, seed=5) == one(*columns, seed=5)
    assert one(*columns, seed=5) != one(*columns, seed=6)


@pytest.mark.parametrize("rows", [6, 15, 80])
def test_intervals_hold_what_they_claim(rows):
    """Rows of skewed length whose effect depends on it: of 95 % intervals, about 95 % hold the truth."""
    rng = np.random.default_rng(rows)

    def draw(count):
        tokens = np.ceil(rng.lognormal(3, 0.7, count))
        base = tokens * rng.gamma(4, 0.5, count)
        return base, base + tokens * (rng.normal(-0.3, 0.4, count) + 0.02 * np.log(tokens)), tokens

    base, adapter, tokens = draw(1_000_000)
    truth = (adapter - base).sum() / tokens.sum()
    draws = 150
    held = sum(m.low <= truth <= m.high for m in (one(*draw(rows), seed=s) for s in range(draws)))
    assert 0.88 <= held / draws <= 0.995


def test_intervals_hold_where_few_rows_make_up_the_change():
    """One row in ten gains: a percentile interval, expanded or not, holds the truth in 87 % of the cases or less."""
    rng = np.random.default_rng(0)
    draws, held = 300, 0
    for seed in range(draws):
        gains = np.where(rng.random(100) < 0.1, rng.gamma(2, 1.0, 100), 0.0)
        measure = one(np.full(100, 3.0), 3.0 - gains, np.ones(100), seed=seed)
        held += measure.low <= -0.2 <= measure.high
    assert held / draws >= 0.92


def test_a_bootstrap_t_bound_by_brute_force():
    """The interval reaches at least as far as bootstrap-t's, with errors found row by row in each draw."""
    rng = np.random.default_rng(3)
    tokens = np.ceil(rng.lognormal(2, 1, 25))
    change = tokens * rng.exponential(1, 25) ** 2
    found = one(np.zeros(25), change, tokens, seed=1)

    def figure(rows):
        ratio = change[rows].sum() / tokens[rows].sum()
        return ratio, np.sqrt(np.square(change[rows] - ratio * tokens[rows]).sum()) / tokens[rows].sum()

    whole, error = figure(np.arange(25))
    drawn = [figure(rng.integers(0, 25, 25)) for _ in range(20_000)]
    least, most = np.quantile([(ratio - whole) / its_error for ratio, its_error in drawn], [0.025, 0.975])
    assert found.high == pytest.approx(whole - least * error, rel=0.05)
    assert found.low <= whole - most * error * 0.95


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.98), (0.5, 0.6), (0.9, 0.92)])
@pytest.mark.parametrize("rows", [10, 40])
def test_intervals_of_shares_hold_what_they_claim(before, after, rows):
    """Where nearly every row says the same, a bootstrap of 10 rows holds the truth in a third of the cases or less."""
    random = np.random.default_rng(rows)
    draws, held = 200, 0
    for seed in range(draws):
        luck = random.random(rows)
        again = np.where(random.random(rows) < 0.5, luck, random.random(rows))
        measure = one(luck < before, again < after, np.ones(rows), seed=seed)
        held += measure.low <= after - before <= measure.high
    assert held / draws >= 0.90


shares = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(shares)
def test_an_interval_of_shares_is_one(rows):
    base, adapter = (np.array(column) for column in zip(*rows, strict=True))
    low, high = paired_share_interval(base, adapter)
    assert -1 <= low <= adapter.mean() - base.mean() <= high <= 1
    assert low < high  # no number of rows makes one certain
    assert (-high, -low) == pytest.approx(paired_share_interval(adapter, base))
    more = paired_share_interval(np.tile(base, 50), np.tile(adapter, 50))
    assert more[1] - more[0] < high - low


def test_an_interval_of_unrelated_shares_is_wilsons_squares_added():
    base, adapter = np.array([1, 1, 0, 0] * 5, dtype=bool), np.array([1, 0, 1, 0] * 5, dtype=bool)  # phi is 0
    z = NormalDist().inv_cdf(0.975)
    half = z * math.sqrt(0.25 / 20 + z**2 / (4 * 20**2)) / (1 + z**2 / 20)  # Wilson's, of 10 in 20
    reach = math.hypot(half, half)
    assert paired_share_interval(base, adapter) == pytest.approx((-reach, reach))


def test_shares_of_the_rows_that_count_alone():
    base, adapter, counted = (np.array(column, dtype=float) for column in ([0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]))
    measure = one(base, adapter, counted)
    assert (measure.low, measure.high) == paired_share_interval(base[:3] > 0, adapter[:3] > 0)


def test_what_changes_nothing_is_known_to():
    [measure] = compare([Ratio("right", *(np.ones(6),) * 3)], seed=0, same=True)
    assert (measure.low, measure.high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("freedom", "known"), [(4, 2.776445), (9, 2.262157), (30, 2.042272), (1000, 1.962339)]
)  # tables
def test_students_quantile(freedom, known):
    assert student_quantile(0.975, freedom) == pytest.approx(known, rel=3e-3)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 3), (6, 0), (1, 8), (7, 4)])
def test_the_sign_test_counts_outcomes(better, worse):
    count = better + worse
    as_uneven = [min(sum(signs), count - sum(signs)) <= min(better, worse) for signs in product((0, 1), repeat=count)]
    assert sign_test(better, worse) == pytest.approx(min(1.0, sum(as_uneven) / len(as_uneven)))


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_the_sign_test_is_a_probability(better, worse):
    p = sign_test(better, worse)
    assert 0 <= p <= 1
    assert p == sign_test(worse, better)


def test_perplexity_is_a_loss_in_other_words():
    measure = perplexity(Measure("loss", 2.0, 1.5, -0.5, -0.6, -0.4))
    assert measure.base == pytest.approx(math.exp(2.0))
    assert measure.difference == pytest.approx(math.exp(1.5) - math.exp(2.0))
    assert measure.low < measure.difference < measure.high < 0


def test_a_perplexity_beyond_floating_point_is_infinite():
    assert perplexity(Measure("loss", 2.0, 1e6, 1e6, 1e6, 1e6)).adapter == math.inf
