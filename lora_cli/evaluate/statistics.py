"""Figures over rows, and how sure they are: paired bootstrap intervals, score intervals, the sign test.

A figure is a ratio of sums over rows (nats per token, right tokens per token), so a draw of rows with
replacement gives another figure. Base and adapter are always drawn together. What is yes or no in each row has
a score interval instead: where nearly all rows say the same, draws of them hardly differ, and a bootstrap would be
sure of what it hasn't seen (scripts/intervals.py measures both). Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lora_cli.report.comparison import Measure

CONFIDENCE = 0.95
DRAWS = 4000
_BLOCK = 2**20
"""Rows drawn at once."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A figure as it is made of rows: the sum of `base`, or of `adapter`, over the sum of `per`."""

    name: str
    base: Floats
    """[N], one number for each row"""
    adapter: Floats
    per: Floats

    @property
    def yes_or_no(self) -> bool:
        """Whether each row that counts is 0 or 1 for either model."""
        return all(bool(np.isin(column, (0.0, 1.0)).all()) for column in (self.base, self.adapter, self.per))

    @property
    def effective_rows(self) -> float:
        """How many rows of equal weight would be as sure: a few long rows count for more than the others."""
        return float(self.per.sum() ** 2 / np.square(self.per).sum())


def compare(ratios: Sequence[Ratio], *, seed: int, same: bool = False, draws: int | None = None) -> tuple[Measure, ...]:
    """Every figure of base and adapter, with the interval of its difference. All are over the same rows.

    Args:
        same: the adapter is known to change nothing, so that a difference of 0 is a fact and not a guess.
        draws: of the bootstrap; None is `DRAWS`, and for 10,000 rows or more, where they agree anyway, a quarter.
    """
    drawn = [ratio for ratio in ratios if same or not ratio.yes_or_no]
    bounds = dict(zip(map(id, drawn), _bootstrap(drawn, seed, draws), strict=True))
    measures = []
    for ratio in ratios:
        base, adapter, per = (float(column.sum()) for column in (ratio.base, ratio.adapter, ratio.per))
        counted = ratio.per > 0
        low, high = bounds.get(id(ratio)) or paired_share_interval(ratio.base[counted] > 0, ratio.adapter[counted] > 0)
        measures.append(Measure(ratio.name, base / per, adapter / per, (adapter - base) / per, low, high))
    return tuple(measures)


def _bootstrap(ratios: Sequence[Ratio], seed: int, draws: int | None) -> list[tuple[float, float]]:
    """The interval of each ratio's difference; all of them see the same draws."""
    if not ratios:
        return []
    columns = [column for ratio in ratios for column in _moments(ratio)]
    values_NK = np.stack(columns, axis=1)
    draws_BK = resampled_sums(values_NK, draws or (DRAWS if len(values_NK) < 10_000 else DRAWS // 4), seed)
    sums_RKB = draws_BK.T.reshape(len(ratios), -1, len(draws_BK))
    return [_outer(ratio, *sums_KB) for ratio, sums_KB in zip(ratios, sums_RKB, strict=True)]


def _moments(ratio: Ratio) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """[N] each: what a draw's ratio and its standard error are made of, around the ratio of all rows."""
    change, per = ratio.adapter - ratio.base, ratio.per.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        around = change - change.sum() / per.sum() * per
    return around, per, around * around, around * per, per * per


def _outer(
    ratio: Ratio, around_B: Floats, per_B: Floats, aa_B: Floats, ap_B: Floats, pp_B: Floats
) -> tuple[float, float]:
    """On either side the outer of two bounds: of the expanded percentile interval and of the bootstrap-t.

    The percentile's is too narrow where few rows make up most of the change, bootstrap-t's erratic where there are few
    rows; together they hold what is claimed for more kinds of rows than either (scripts/intervals.py).
    """
    difference = float((ratio.adapter - ratio.base).sum() / ratio.per.sum())
    rows = len(ratio.per)
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold no row that counts
        off_B = around_B / per_B
        errors_B = np.sqrt(np.maximum(aa_B - 2 * off_B * ap_B + off_B**2 * pp_B, 0.0)) / per_B
    low, high = interval(off_B, ratio.effective_rows)
    error = float(np.sqrt(np.square(_moments(ratio)[0]).sum()) / ratio.per.sum())
    # Draws of a few equal rows have no error of their own.
    sound_B = np.isfinite(off_B) & (errors_B > 1e-3 * error)
    if rows > 1 and sound_B.sum() > len(off_B) // 2:
        tail = (1 - CONFIDENCE) / 2
        # Dividing by N instead of N - 1 cancels: it does so in the draws' errors and in that of all rows.
        least, most = np.quantile(off_B[sound_B] / errors_B[sound_B], [tail, 1 - tail])
        low, high = min(low, -float(most) * error), max(high, -float(least) * error)
    return difference + low, difference + high


def perplexity(loss: Measure) -> Measure:
    """Perplexities for a loss; the interval is the loss's, carried over at the base's perplexity."""
    with np.errstate(over="ignore"):
        base, adapter = (float(np.exp(value)) for value in (loss.base, loss.adapter))
        low, high = (float(base * np.expm1(bound)) for bound in (loss.low, loss.high))
    return Measure("perplexity", base, adapter, adapter - base, low, high)


def resampled_sums(values_NK: Floats, draws: int, seed: int) -> Floats:
    """[draws, K]: column sums over N rows drawn with replacement, the same rows for all columns of a draw."""
    rows, sums = len(values_NK), []
    random = np.random.Generator(np.random.PCG64(seed))
    block = max(1, _BLOCK // rows)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        picked = random.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        times_BN = np.bincount(picked.ravel(), minlength=count * rows).reshape(count, rows)
        sums.append(times_BN @ values_NK)
    return np.concatenate(sums)


def interval(draws_B: Floats, rows: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval, widened for few rows.

    A plain percentile interval is too narrow by the factor between the normal and Student's distribution,
    and by that between dividing by N and by N - 1. Its tails are moved out accordingly (Hesterberg 2015,
    "expanded percentile"), which brings coverage back to what is claimed.
    """
    finite = draws_B[np.isfinite(draws_B)]
    if len(finite) == 0:
        return math.nan, math.nan
    rows = max(rows, 1.5)  # with a single row every draw is the same anyway
    deviations = student_quantile((1 + confidence) / 2, rows - 1) * math.sqrt(rows / (rows - 1))
    tail = NormalDist().cdf(-deviations)
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def paired_share_interval(
    base_N: NDArray[np.bool_], adapter_N: NDArray[np.bool_], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of the difference of two shares of the same rows, adapter - base.

    Wilson's interval of either share, put together with their correlation (Newcombe 1998, "Improved confidence
    intervals for the difference between binomial proportions based on paired data", method 10).
    """
    rows = len(base_N)
    if rows == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    both, neither = int((base_N & adapter_N).sum()), int((~base_N & ~adapter_N).sum())
    right = (int(base_N.sum()), int(adapter_N.sum()))
    (base, base_low, base_high), (adapter, adapter_low, adapter_high) = (_wilson(x, rows, z) for x in right)
    product = right[0] * (rows - right[0]) * right[1] * (rows - right[1])
    surplus: float = both * neither - (right[0] - both) * (right[1] - both)
    if surplus > 0:  # a continuity correction, in favour of less correlation
        surplus = max(surplus - rows / 2, 0)
    phi = surplus / math.sqrt(product) if product else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    difference = adapter - base
    low = difference - reach(adapter - adapter_low, base_high - base)
    high = difference + reach(adapter_high - adapter, base - base_low)
    return max(-1.0, low), min(1.0, high)


def _wilson(right: int, rows: int, z: float) -> tuple[float, float, float]:
    """A share with Wilson's score interval."""
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return share, middle - half, middle + half


def student_quantile(probability: float, freedom: float) -> float:
    """Student's t quantile by its expansion around the normal one; 0.1 % off at 5 degrees of freedom."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / (4 * freedom),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3),
    )
    return sum(terms)


def sign_test(better: int, worse: int) -> float:
    """The two-sided p-value of a split this uneven or more, if better and worse were equally likely."""
    count, fewer = better + worse, min(better, worse)
    if count == 0:
        return 1.0
    whole = math.lgamma(count + 1) - count * math.log(2)
    tail = math.fsum(math.exp(whole - math.lgamma(k + 1) - math.lgamma(count - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)
