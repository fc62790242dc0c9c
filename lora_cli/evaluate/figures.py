"""Figures of a pair: what base and adapter made of the rows, as measures with intervals, changes and a verdict.

Knows what is measured; knows nothing about how a model was run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_cli.evaluate.answers import Question
from lora_cli.evaluate.bench import Bench, Observed
from lora_cli.evaluate.matching import Marks, mark
from lora_cli.evaluate.statistics import Ratio, compare, perplexity, sign_test
from lora_cli.evaluate.verdict import decide, in_words
from lora_cli.report.comparison import Comparison, Group, Measure, RowChange

ROWS_NAMED = 3
"""Rows that gained and that lost most."""


@dataclass(frozen=True)
class Pair:
    """What base and adapter made of the rows."""

    result: Path
    precision: str
    base: Observed
    adapter: Observed

    @property
    def same(self) -> bool:
        """Whether the adapter changes no row's loss at all, as one with B = 0 must."""
        return np.array_equal(self.base.scores.loss, self.adapter.scores.loss)


def compare_pair(bench: Bench, pair: Pair, first: Pair) -> Comparison:
    """Every figure of the pair, the verdict, and how it does against the first adapter on the same base."""
    examples = bench.rows.examples
    ratios = _ratios(bench, pair)
    seed = bench.target.config.train.seed
    measures = _measures(ratios, np.ones(len(examples), dtype=bool), seed=seed, same=pair.same)
    base, adapter = pair.base.scores.loss, pair.adapter.scores.loss
    better, worse = int((adapter < base).sum()), int((adapter > base).sum())
    outcome = decide(measures[0], len(examples), better, worse)
    changes = [
        RowChange(examples.places[index], float(base[index] / tokens), float(adapter[index] / tokens))
        for index, tokens in enumerate(examples.supervised.tolist())
    ]
    ordered = sorted((change for change in changes if change.difference != 0), key=lambda change: change.difference)
    return Comparison(
        adapter=str(pair.result),
        precision=pair.precision,
        measures=measures,
        better=better,
        worse=worse,
        sign_test_p=sign_test(better, worse),
        outcome=outcome,
        verdict=in_words(outcome, measures[0], len(examples), better, worse),
        gained=tuple(change for change in ordered[:ROWS_NAMED] if change.difference < 0),
        lost=tuple(change for change in ordered[::-1][:ROWS_NAMED] if change.difference > 0),
        groups=_groups(bench, pair, ratios),
        versus=None if pair is first or pair.base is not first.base else _versus(bench, first, pair),
    )


def _versus(bench: Bench, first: Pair, pair: Pair) -> Measure:
    """The loss of one adapter against another's, in pairs as well: closer than two differences from the base."""
    between = Pair(pair.result, pair.precision, first.adapter, pair.adapter)
    [loss] = compare(_scored(bench, between)[:1], seed=bench.target.config.train.seed, same=between.same)
    return loss


@dataclass(frozen=True)
class Ratios:
    """Ratios over some of the rows: all of them, those that were asked, those that could choose."""

    ratios: list[Ratio]
    rows: NDArray[np.int64]

    def within(self, members: NDArray[np.bool_]) -> list[Ratio]:
        """Over those of the rows that belong to a group; none where no row has a say."""
        chosen = members[self.rows]
        found = [Ratio(one.name, one.base[chosen], one.adapter[chosen], one.per[chosen]) for one in self.ratios]
        return [ratio for ratio in found if ratio.per.any()]


def _ratios(bench: Bench, pair: Pair) -> list[Ratios]:
    """Everything that was measured, loss first."""
    found = [Ratios(_scored(bench, pair), np.arange(len(bench.rows.examples)))]
    if bench.ballot is not None:
        assert pair.base.choice_losses is not None and pair.adapter.choice_losses is not None
        marks = (bench.ballot.marks(losses) for losses in (pair.base.choice_losses, pair.adapter.choice_losses))
        found.append(Ratios(_paired(*marks), _rows_of(bench.ballot.questions)))
    if bench.asked:
        marks = (_answered(bench, observed) for observed in (pair.base, pair.adapter))
        found.append(Ratios(_paired(*marks), _rows_of(bench.asked)))
    return found


def _rows_of(questions: Sequence[Question]) -> NDArray[np.int64]:
    return np.array([question.row for question in questions], dtype=np.int64)


def _measures(ratios: Sequence[Ratios], members: NDArray[np.bool_], *, seed: int, same: bool) -> tuple[Measure, ...]:
    """Every measure of the rows in a group, loss and perplexity first."""
    found = [measure for one in ratios for measure in compare(one.within(members), seed=seed, same=same)]
    return (found[0], perplexity(found[0]), *found[1:])


def _scored(bench: Bench, pair: Pair) -> list[Ratio]:
    """Ratios that every row takes part in, loss first."""
    tokens = bench.rows.examples.supervised.astype(np.float64)
    base, adapter = pair.base.scores, pair.adapter.scores
    ratios = [
        Ratio("loss", base.loss, adapter.loss, tokens),
        Ratio("row_loss", base.loss / tokens, adapter.loss / tokens, np.ones(len(tokens))),
        Ratio("token_accuracy", base.correct, adapter.correct, tokens),
    ]
    if bench.rows.supervised_bytes.any():
        bits = bench.rows.supervised_bytes * math.log(2)
        ratios.append(Ratio("bits_per_byte", base.loss, adapter.loss, bits))
    return ratios


def _answered(bench: Bench, observed: Observed) -> tuple[Marks, ...]:
    """How a model's answers are, and how long."""
    answers = [answer.text for answer in observed.answers]
    references = [question.reference for question in bench.asked]
    ended = [answer.stop_reason == "stop" for answer in observed.answers]
    lengths = np.array([float(len(answer.token_ids)) for answer in observed.answers])
    return (
        *mark(answers, references, ended, bench.pattern),
        Marks("answer_tokens", lengths, np.ones(len(lengths))),
    )


def _paired(base: Sequence[Marks], adapter: Sequence[Marks]) -> list[Ratio]:
    marks = zip(base, adapter, strict=True)
    return [Ratio(before.name, before.values, after.values, before.counted) for before, after in marks]


def _groups(bench: Bench, pair: Pair, ratios: Sequence[Ratios]) -> tuple[Group, ...]:
    """Every measure of each group of rows, the largest group first."""
    if bench.groups is None:
        return ()
    members = np.array(bench.groups, dtype=object)
    base, adapter = pair.base.scores.loss, pair.adapter.scores.loss
    seed = bench.target.config.train.seed
    found = []
    for name, rows in sorted(Counter(bench.groups).items(), key=lambda item: (-item[1], item[0])):
        chosen: NDArray[np.bool_] = members == name
        measures = _measures(ratios, chosen, seed=seed, same=pair.same)
        better, worse = int((adapter < base)[chosen].sum()), int((adapter > base)[chosen].sum())
        found.append(Group(name, rows, measures, better, worse, decide(measures[0], rows, better, worse)))
    return tuple(found)
