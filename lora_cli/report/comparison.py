"""What an evaluation or a generation found, as frozen values.

`evaluate` makes them, the screens lay them out, `--json` prints them. Knows nothing about how a figure was
measured; imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["better", "worse", "no difference", "can't tell"]

FEWEST_ROWS = 5
"""With fewer, no interval holds what it claims, and neither better nor worse is said."""


@dataclass(frozen=True)
class Measure:
    """One figure of base and adapter on the same rows. `difference` is adapter - base."""

    name: str
    base: float
    adapter: float
    difference: float
    low: float
    """The 95 % interval of the difference: by a bootstrap over rows, or Newcombe's for what is yes or no in a row."""
    high: float

    def as_json(self) -> dict[str, float]:
        return {
            "base": self.base,
            "adapter": self.adapter,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class RowChange:
    """How one row's loss changed."""

    place: str
    """Where the row stands: `test.jsonl:17`."""
    base: float
    """Nats per supervised token."""
    adapter: float

    @property
    def difference(self) -> float:
        return self.adapter - self.base


@dataclass(frozen=True)
class Group:
    """The rows that have one value in a column."""

    name: str
    rows: int
    measures: tuple[Measure, ...]
    """Loss first."""
    better: int
    worse: int
    outcome: Outcome

    @property
    def loss(self) -> Measure:
        return self.measures[0]

    def as_json(self) -> dict[str, Any]:
        counts = {"rows": self.rows, "rows_better": self.better, "rows_worse": self.worse}
        measures = {measure.name: measure.as_json() for measure in self.measures}
        return {"group": self.name, **counts, "outcome": self.outcome, **measures}


@dataclass(frozen=True)
class Comparison:
    """One adapter against its base, on the same rows and at the same precision."""

    adapter: str
    """Its folder."""
    precision: str
    """Of the base that both were judged on: `nf4, double quant`, `float32`."""
    measures: tuple[Measure, ...]
    """Loss first."""
    better: int
    """Rows whose loss fell."""
    worse: int
    sign_test_p: float
    """Two-sided: how likely so uneven a split of better and worse rows is by chance."""
    outcome: Outcome
    verdict: str
    """The outcome in words, with its figures."""
    gained: tuple[RowChange, ...]
    """The rows whose loss fell most."""
    lost: tuple[RowChange, ...]
    """The rows whose loss rose most."""
    groups: tuple[Group, ...] = ()
    """The same by the values of a column, where one was named."""
    versus: Measure | None = None
    """Its loss against that of the target's adapter, which stands as `base` here; None for that one itself."""

    @property
    def loss(self) -> Measure:
        return self.measures[0]

    @property
    def improvement(self) -> float:
        """Nats per token by which the loss fell."""
        return -self.loss.difference

    def figures(self) -> dict[str, Any]:
        """base, adapter and difference, as `--json` has them."""
        return {
            "precision": self.precision,
            "base": {measure.name: measure.base for measure in self.measures},
            "adapter": {measure.name: measure.adapter for measure in self.measures},
            "difference": {
                **{measure.name: measure.difference for measure in self.measures},
                "low": self.loss.low,
                "high": self.loss.high,
                "intervals": {measure.name: [measure.low, measure.high] for measure in self.measures},
            },
            "rows_better": self.better,
            "rows_worse": self.worse,
            "sign_test_p": self.sign_test_p,
            "outcome": self.outcome,
            "verdict": self.verdict,
            "gained": [{**asdict(row), "difference": row.difference} for row in self.gained],
            "lost": [{**asdict(row), "difference": row.difference} for row in self.lost],
            "groups": [group.as_json() for group in self.groups],
            "versus_first": None if self.versus is None else self.versus.as_json(),
        }


@dataclass(frozen=True)
class Demand:
    """What was asked of the adapter, for an exit code."""

    min_improvement: float | None = None
    """Nats per token by which the loss must fall."""
    fail_if_worse: bool = False

    def is_met_by(self, comparison: Comparison) -> bool:
        return self.unmet_by(comparison) is None

    def unmet_by(self, comparison: Comparison) -> str | None:
        """What is missing, in words."""
        wanted, loss = self.min_improvement, comparison.loss
        if wanted is not None and not comparison.improvement >= wanted:
            if not math.isfinite(loss.difference):
                return f"{wanted:g} nats of improvement were asked; the loss is not finite"
            course = f"fell by {-loss.difference:.4f}" if loss.difference <= 0 else f"rose by {loss.difference:.4f}"
            return f"{wanted:g} nats of improvement were asked; the loss {course}"
        if self.fail_if_worse and comparison.outcome == "worse":
            return f"the adapter is {comparison.verdict}"
        return None


@dataclass(frozen=True)
class Evaluation:
    """Base and adapter on the same rows."""

    target: str
    data: str
    """Which rows: a source, `validation` or `train`."""
    rows: int
    num_supervised_tokens: int
    answers: int
    """Rows that were answered by both, with `generate`."""
    comparison: Comparison
    """The target's adapter, at the precision that it was trained at unless asked otherwise."""
    others: tuple[Comparison, ...]
    """Other adapters and precisions that were asked for, on the same rows."""
    warnings: tuple[str, ...]
    demand: Demand
    folder: Path | None
    """Where figures and rows were written."""
    choices: tuple[str, ...] = ()
    """What could be chosen from, where that was asked."""
    base_kept: bool = False
    """Whether the base's part is that of an earlier evaluation."""

    @property
    def meets_demand(self) -> bool:
        return self.demand.is_met_by(self.comparison)

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that JSON doesn't have become None."""
        values: dict[str, Any] = _finite(
            {
                "target": self.target,
                "data": self.data,
                "rows": self.rows,
                "num_supervised_tokens": self.num_supervised_tokens,
                "answers": self.answers,
                "choices": list(self.choices),
                "base_kept": self.base_kept,
                **self.comparison.figures(),
                "others": [{"adapter_folder": one.adapter, **one.figures()} for one in self.others],
                "warnings": list(self.warnings),
                "demand": {**asdict(self.demand), "met": self.meets_demand},
                "folder": None if self.folder is None else str(self.folder),
            }
        )
        return values


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value


@dataclass(frozen=True)
class Output:
    """One answer to one prompt."""

    prompt: str
    adapter: str | None
    """The adapter's folder; None for the base."""
    text: str
    stop_reason: str
    """`stop` when the model ended by itself, `length` when it was cut."""


@dataclass(frozen=True)
class Generations:
    """Answers to prompts: for each prompt the base's, then those of the adapters in the order given."""

    outputs: tuple[Output, ...]

    def as_json(self) -> dict[str, Any]:
        return {"outputs": [asdict(output) for output in self.outputs]}
