"""What an evaluation or a generation found, as frozen values.

`evaluate` makes them, the screens lay them out, `--json` prints them. Knows nothing about how a figure was
measured; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["better", "worse", "no difference", "can't tell"]


@dataclass(frozen=True)
class Measure:
    """One figure of base and adapter on the same rows. `difference` is adapter - base."""

    name: str
    base: float
    adapter: float
    difference: float
    low: float | None
    """The 95 % interval of the difference; None where there are too few rows for one."""
    high: float | None


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
class Demand:
    """What was asked of the adapter, for an exit code."""

    min_improvement: float | None = None
    """Nats per token by which the loss must fall."""
    fail_if_worse: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Base and adapter on the same rows."""

    target: str
    data: str
    """Which rows: a source, `validation` or `train`."""
    rows: int
    num_supervised_tokens: int
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
    answers: int
    """Rows that were answered by both, with `generate`."""
    gained: tuple[RowChange, ...]
    """The rows whose loss fell most."""
    lost: tuple[RowChange, ...]
    """The rows whose loss rose most."""
    warnings: tuple[str, ...]
    demand: Demand
    folder: Path | None
    """Where figures and rows were written."""

    @property
    def loss(self) -> Measure:
        return self.measures[0]

    @property
    def improvement(self) -> float:
        """Nats per token by which the loss fell."""
        return -self.loss.difference

    @property
    def meets_demand(self) -> bool:
        wanted = self.demand.min_improvement
        if wanted is not None and not self.improvement >= wanted:
            return False
        return not (self.demand.fail_if_worse and self.outcome == "worse")

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "data": self.data,
            "rows": self.rows,
            "num_supervised_tokens": self.num_supervised_tokens,
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
            "answers": self.answers,
            "gained": [asdict(row) for row in self.gained],
            "lost": [asdict(row) for row in self.lost],
            "warnings": list(self.warnings),
            "demand": {**asdict(self.demand), "met": self.meets_demand},
            "folder": None if self.folder is None else str(self.folder),
        }


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
