"""Do the intervals of `lora eval` hold what they claim? Populations whose truth is known, sampled again and again.

    python scripts/intervals.py .demo/lora/eval/validation/rows.parquet     about five minutes on one core
    python scripts/intervals.py --samples 20 --draws 200                    a smoke test; its figures mean nothing

A population is the rows of an evaluation, or made up here: rows of skewed length whose gain depends on it, rows of
which few gain anything, and answers that are right or wrong. From each, samples of rows are drawn with replacement;
each gets its interval by the code that `lora eval` runs; printed is the share of intervals that hold the difference
over the whole population. 95 % are claimed: with 1,000 samples, 93.6 to 96.4 % is what chance leaves of that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_cli.evaluate.statistics import Ratio, compare

SIZES = (10, 30, 100, 200)
MADE_UP_ROWS = 1_000_000


@dataclass(frozen=True)
class Population:
    """All rows that there are, and so the truth."""

    name: str
    ratio: Ratio

    @property
    def truth(self) -> float:
        return float((self.ratio.adapter - self.ratio.base).sum() / self.ratio.per.sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", type=Path, help="rows.parquet of evaluations, for populations")
    parser.add_argument("--samples", type=int, default=1000, help="of each size (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=1000, help="of each bootstrap (default: %(default)s)")
    arguments = parser.parse_args()
    populations = [*(one for file in arguments.rows for one in of_evaluation(file)), *made_up()]
    print(f"share of 95 % intervals that hold the truth, {arguments.samples:,} samples, {arguments.draws:,} draws each")
    print(f"{'population':<44}{'truth':>9}  " + "".join(f"{f'n={size}':>9}" for size in SIZES))
    for population in populations:
        shares = [coverage(population, size, arguments.samples, arguments.draws) for size in SIZES]
        print(f"{population.name:<44}{population.truth:>+9.4f}  " + "".join(f"{share:>9.1%}" for share in shares))


def coverage(population: Population, size: int, samples: int, draws: int) -> float:
    """The share of samples whose interval holds the truth."""
    random = np.random.default_rng(size)
    ratio, truth, held = population.ratio, population.truth, 0
    for seed in range(samples):
        chosen = random.integers(0, len(ratio.per), size)
        if ratio.per[chosen].any():
            sample = Ratio(ratio.name, ratio.base[chosen], ratio.adapter[chosen], ratio.per[chosen])
            [measure] = compare([sample], seed=seed, draws=draws)
            held += measure.low <= truth <= measure.high
    return held / samples


def of_evaluation(file: Path) -> Iterator[Population]:
    """What an evaluation found in its rows."""
    import pyarrow.parquet as parquet

    columns: Mapping[str, Sequence[float]] = parquet.read_table(file).to_pydict()
    tokens = floats(columns["num_supervised_tokens"])
    name = "/".join(file.parts[-4:-3])

    def both(column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return floats(columns[f"base_{column}"]), floats(columns[f"adapter_{column}"])

    base, adapter = both("loss")
    yield Population(f"{name}: loss", Ratio("loss", base * tokens, adapter * tokens, tokens))
    yield Population(f"{name}: token accuracy", Ratio("token_accuracy", *both("correct_tokens"), tokens))
    if "base_answer" in columns:
        references = [str(text).strip() for text in columns["reference"]]
        right = [
            floats([str(a).strip() == r for a, r in zip(columns[f"{who}_answer"], references, strict=True)])
            for who in ("base", "adapter")
        ]
        yield Population(f"{name}: exact match", Ratio("exact_match", right[0], right[1], np.ones(len(tokens))))


def made_up() -> list[Population]:
    """Populations that are hard in one way each."""
    random = np.random.default_rng(0)
    count = MADE_UP_ROWS
    tokens = np.ceil(random.lognormal(3, 0.7, count))
    base = tokens * random.gamma(4, 0.5, count)
    gain = random.normal(-0.3, 0.4, count) + 0.02 * np.log(tokens)
    few = np.where(random.random(count) < 0.1, random.gamma(2, 1.0, count), 0.0)
    ones = np.ones(count)
    populations = [
        Population("skewed lengths, gains depend on them: loss", Ratio("loss", base, base + tokens * gain, tokens)),
        Population("one row in ten gains: loss", Ratio("loss", base, base - tokens * few, tokens)),
    ]
    for before, after, alike in ((0.5, 0.6, 0.5), (0.9, 0.92, 0.8), (0.0, 0.98, 0.0), (0.0, 0.02, 0.0)):
        luck = random.random(count)
        again = np.where(random.random(count) < alike, luck, random.random(count))
        ratio = Ratio("right", floats(luck < before), floats(again < after), ones)
        populations.append(Population(f"right in {before:.0%}, then in {after:.0%}: exact match", ratio))
    return populations


def floats(values: Sequence[object] | NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


if __name__ == "__main__":
    main()
