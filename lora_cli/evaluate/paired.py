"""The evaluation itself: the same rows through base and adapter, then figures and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_cli.engine.generation import Generated, Sampling
from lora_cli.evaluate.answers import Question, answer_all, answer_limit, marks, questions
from lora_cli.evaluate.models import Loaded, Reader, load_target, read_target
from lora_cli.evaluate.records import write_evaluation
from lora_cli.evaluate.rows import EvaluationRows, load_rows, rows_name
from lora_cli.evaluate.scoring import RowScores, score_rows
from lora_cli.evaluate.statistics import Ratio, compare, sign_test
from lora_cli.evaluate.target import Target, find_target
from lora_cli.evaluate.verdict import decide, in_words
from lora_cli.report.comparison import Demand, Evaluation, Measure, RowChange
from lora_cli.report.events import Emit, Warned, Working, ignore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_NAMED = 3
"""Rows that gained and that lost most."""


@dataclass(frozen=True)
class Observed:
    """What one model made of the rows."""

    scores: RowScores
    answers: list[Generated]
    """To the questions, in their order; empty without `generate`."""


def evaluate(
    target: Path | str,
    *,
    data: str | None = None,
    generate: bool = False,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int | None = None,
    min_improvement: float | None = None,
    fail_if_worse: bool = False,
    emit: Emit = ignore,
) -> Evaluation:
    """Judge an adapter against its base, on the same rows, at the precision that it was trained at.

    Args:
        target: a run folder, an adapter folder or a config file.
        data: the rows; otherwise the run's validation rows.
        generate: answer the rows' prompts as well, greedily.
        overrides: of the config that the adapter was trained with, as `train.seed=7`.
        limit: judge at most so many rows, drawn by the seed.
        max_new_tokens: of an answer; otherwise enough for the longest reference and half as much again.
        min_improvement, fail_if_worse: kept in the result, whose `meets_demand` says if they are met.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    found = find_target(target, overrides)
    reader = read_target(found)
    rows = load_rows(found, reader, data, limit=limit, emit=emit)
    for text in rows.warnings:
        emit(Warned(text))
    asked = questions(rows.examples, reader) if generate else ()
    sampling = Sampling(max_new_tokens=max_new_tokens or (answer_limit(asked) if asked else 1))
    loaded = load_target(found.config, reader, emit)

    def observe(model: PreTrainedModel, who: str) -> Observed:
        return _observe(model, loaded, reader, rows, asked, sampling, emit, who)

    base = observe(loaded.base, "the base")
    with loaded.adapted(found.adapter) as model:
        adapter = observe(model, "the adapter")
    demand = Demand(min_improvement, fail_if_worse)
    evaluation = _judge(found, rows, asked, loaded, base, adapter, demand)
    if evaluation.folder is not None:
        columns = _columns(rows, asked, base, adapter, reader)
        write_evaluation(evaluation.folder, evaluation, columns)
    return evaluation


def _observe(
    model: PreTrainedModel,
    loaded: Loaded,
    reader: Reader,
    rows: EvaluationRows,
    asked: Sequence[Question],
    sampling: Sampling,
    emit: Emit,
    who: str,
) -> Observed:
    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, total: emit(Working(f"{what} {who}", done, total, "rows"))

    scores = score_rows(
        model,
        loaded.computation,
        rows.examples,
        micro_batch_tokens=loaded.micro_batch_tokens,
        device=loaded.device,
        progress=progress("scoring"),
    )
    prompts = [question.prompt_ids for question in asked]
    return Observed(scores, answer_all(model, loaded, reader, prompts, sampling, progress=progress("asking")))


def _judge(
    target: Target,
    rows: EvaluationRows,
    asked: Sequence[Question],
    loaded: Loaded,
    base: Observed,
    adapter: Observed,
    demand: Demand,
) -> Evaluation:
    examples, seed = rows.examples, target.config.train.seed
    measures = _measures(rows, asked, base, adapter, seed)
    change = adapter.scores.loss - base.scores.loss
    better, worse = int((change < 0).sum()), int((change > 0).sum())
    outcome = decide(measures[0], better, worse)
    per_token = change / examples.supervised
    order = np.argsort(per_token, kind="stable")

    def named(indices: Sequence[int]) -> tuple[RowChange, ...]:
        return tuple(
            RowChange(
                examples.places[i],
                float(base.scores.loss[i] / examples.supervised[i]),
                float(adapter.scores.loss[i] / examples.supervised[i]),
            )
            for i in indices
        )

    return Evaluation(
        target=target.name,
        data=rows.name,
        rows=len(examples),
        num_supervised_tokens=int(examples.supervised.sum()),
        precision=loaded.precision,
        measures=measures,
        better=better,
        worse=worse,
        sign_test_p=sign_test(better, worse),
        outcome=outcome,
        verdict=in_words(outcome, measures[0], len(examples), better, worse),
        answers=len(asked),
        gained=named([int(i) for i in order[:ROWS_NAMED] if per_token[i] < 0]),
        lost=named([int(i) for i in order[::-1][:ROWS_NAMED] if per_token[i] > 0]),
        warnings=rows.warnings,
        demand=demand,
        folder=None if target.run is None else target.run.eval_dir(rows_name(rows.name)),
    )


def _measures(
    rows: EvaluationRows, asked: Sequence[Question], base: Observed, adapter: Observed, seed: int
) -> tuple[Measure, ...]:
    tokens = rows.examples.supervised.astype(np.float64)
    losses = (base.scores.loss, adapter.scores.loss)
    ratios = [
        Ratio("loss", *losses, tokens),
        Ratio("perplexity", *losses, tokens, np.exp),
        Ratio("row_loss", losses[0] / tokens, losses[1] / tokens, np.ones(len(tokens))),
        Ratio("token_accuracy", base.scores.correct, adapter.scores.correct, tokens),
    ]
    if rows.supervised_bytes.any():
        ratios.append(Ratio("bits_per_byte", *losses, rows.supervised_bytes * math.log(2)))
    measures = compare(ratios, seed=seed)
    if not asked:
        return measures
    before, after = marks(asked, base.answers), marks(asked, adapter.answers)
    each = np.ones(len(asked))
    return measures + compare([Ratio(name, before[name], after[name], each) for name in before], seed=seed)


def _columns(
    rows: EvaluationRows, asked: Sequence[Question], base: Observed, adapter: Observed, reader: Reader
) -> dict[str, list[Any]]:
    """rows.parquet: one row for each that was judged."""
    examples = rows.examples
    columns: dict[str, list[Any]] = {
        "place": list(examples.places),
        "num_tokens": examples.lengths.tolist(),
        "num_supervised_tokens": examples.supervised.tolist(),
        "base_loss": (base.scores.loss / examples.supervised).tolist(),
        "adapter_loss": (adapter.scores.loss / examples.supervised).tolist(),
        "base_correct_tokens": base.scores.correct.astype(np.int64).tolist(),
        "adapter_correct_tokens": adapter.scores.correct.astype(np.int64).tolist(),
        "supervised_bytes": rows.supervised_bytes.astype(np.int64).tolist(),
        "text": [str(reader.tokenizer.decode(examples.example(i).input_ids)) for i in range(len(examples))],
    }
    if asked:
        by_row: dict[int, tuple[Question, Generated, Generated]] = {
            question.row: (question, before, after)
            for question, before, after in zip(asked, base.answers, adapter.answers, strict=True)
        }
        answered = [by_row.get(index) for index in range(len(examples))]
        columns["prompt"] = [one and one[0].prompt for one in answered]
        columns["reference"] = [one and one[0].reference for one in answered]
        for position, who in ((1, "base"), (2, "adapter")):
            found: list[Any] = [one and one[position] for one in answered]
            columns[f"{who}_answer"] = [one and one.text for one in found]
            columns[f"{who}_answer_tokens"] = [one and len(one.token_ids) for one in found]
            columns[f"{who}_stop_reason"] = [one and one.stop_reason for one in found]
    return columns
