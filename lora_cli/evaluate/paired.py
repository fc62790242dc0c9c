"""The evaluation itself: the same rows through base and adapter, then figures and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_cli.engine.generation import Generated, Sampling
from lora_cli.engine.trained import Target, adapter_folder, find_target
from lora_cli.errors import RunFolderError, UserError
from lora_cli.evaluate.answers import Question, answer_all, answer_limit, questions
from lora_cli.evaluate.matching import Marks, mark
from lora_cli.evaluate.models import Loaded, Reader, load_target, read_target
from lora_cli.evaluate.records import write_evaluation
from lora_cli.evaluate.rows import EvaluationRows, load_rows, rows_name
from lora_cli.evaluate.scoring import RowScores, score_rows
from lora_cli.evaluate.statistics import Ratio, compare, perplexity, sign_test
from lora_cli.evaluate.verdict import decide, in_words
from lora_cli.report.comparison import Comparison, Demand, Evaluation, Measure, RowChange
from lora_cli.report.events import Emit, Warned, Working, ignore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BasePrecision = Literal["trained", "original", "both"]

ROWS_NAMED = 3
"""Rows that gained and that lost most."""


@dataclass(frozen=True)
class Bench:
    """What every model is put through: rows to score, and prompts to answer."""

    target: Target
    reader: Reader
    rows: EvaluationRows
    asked: tuple[Question, ...]
    """Empty without `generate`."""
    sampling: Sampling
    emit: Emit

    def observe(self, model: PreTrainedModel, loaded: Loaded, who: str) -> Observed:
        """What a model makes of the rows."""

        def progress(what: str) -> Callable[[int, int], None]:
            return lambda done, total: self.emit(Working(f"{what} {who}", done, total, "rows"))

        scores = score_rows(
            model,
            loaded.computation,
            self.rows.examples,
            micro_batch_tokens=loaded.micro_batch_tokens,
            device=loaded.device,
            progress=progress("scoring"),
        )
        prompts = [question.prompt_ids for question in self.asked]
        answers = answer_all(model, loaded, self.reader, prompts, self.sampling, progress=progress("asking"))
        return Observed(scores, answers)


@dataclass(frozen=True)
class Observed:
    """What one model made of the rows."""

    scores: RowScores
    answers: list[Generated]
    """To the questions, in their order."""


@dataclass(frozen=True)
class Pair:
    """What base and adapter made of the rows."""

    result: Path
    precision: str
    base: Observed
    adapter: Observed


def evaluate(
    target: Path | str,
    *,
    data: str | None = None,
    generate: bool = False,
    overrides: Sequence[str] = (),
    adapters: Sequence[str] = (),
    base: BasePrecision = "trained",
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
        adapters: further adapters of the same base, judged beside the target's.
        base: judge on the base as it was quantized in training, on the original weights, or on both.
        limit: judge at most so many rows, drawn by the seed.
        max_new_tokens: of an answer; otherwise enough for the longest reference and half as much again.
        min_improvement, fail_if_worse: kept in the result, whose `meets_demand` says if they are met.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    found = find_target(target, overrides)
    results = [found.result, *map(adapter_folder, adapters)]
    bench = _prepare(found, data, generate, limit, max_new_tokens, emit)
    quantized = found.config.model.quantization is not None
    pairs: list[Pair] = []
    for as_trained in _precisions(base, quantized):
        pairs += _judge_at(bench, results, as_trained)
    evaluation = _evaluation(bench, pairs, Demand(min_improvement, fail_if_worse))
    if evaluation.folder is None:
        return evaluation
    try:
        write_evaluation(evaluation.folder, evaluation, _columns(bench, pairs[0]))
    except RunFolderError as error:  # a run of someone else's can be judged all the same
        emit(Warned(f"{error.message}; the figures are not kept"))
        return replace(evaluation, folder=None)
    return evaluation


def _prepare(
    target: Target, data: str | None, generate: bool, limit: int | None, max_new_tokens: int | None, emit: Emit
) -> Bench:
    """Everything that can be known before weights are loaded."""
    reader = read_target(target)
    rows = load_rows(target, reader, data, limit=limit, emit=emit)
    for text in rows.warnings:
        emit(Warned(text))
    asked = questions(rows.examples, reader) if generate else ()
    tokens = max_new_tokens or (answer_limit(asked) if asked else 1)
    return Bench(target, reader, rows, asked, Sampling(max_new_tokens=tokens), emit)


def _precisions(base: BasePrecision, quantized: bool) -> list[bool]:
    """Whether to judge on the base as it was trained on, one after the other."""
    if base != "trained" and not quantized:
        raise UserError(f"--base {base}: the base was not quantized in training", remedy="Leave --base out.")
    return {"trained": [True], "original": [False], "both": [True, False]}[base]


def _judge_at(bench: Bench, results: Sequence[Path], as_trained: bool) -> list[Pair]:
    """The base once, then everything that was trained on it."""
    loaded = load_target(bench.target, bench.reader, bench.emit, quantized=as_trained)
    base = bench.observe(loaded.base, loaded, "the base")
    pairs = []
    for number, result in enumerate(results):
        with loaded.trained(result) as model:
            who = "the adapter" if number == 0 else str(result)
            pairs.append(Pair(result, loaded.precision, base, bench.observe(model, loaded, who)))
    return pairs


def _evaluation(bench: Bench, pairs: Sequence[Pair], demand: Demand) -> Evaluation:
    comparisons = tuple(_compare(bench, pair) for pair in pairs)
    rows, run = bench.rows, bench.target.run
    return Evaluation(
        target=bench.target.name,
        data=rows.name,
        rows=len(rows.examples),
        num_supervised_tokens=int(rows.examples.supervised.sum()),
        answers=len(bench.asked),
        comparison=comparisons[0],
        others=comparisons[1:],
        warnings=rows.warnings,
        demand=demand,
        folder=None if run is None else run.eval_dir(rows_name(rows.name)),
    )


def _compare(bench: Bench, pair: Pair) -> Comparison:
    examples = bench.rows.examples
    measures = _measures(bench, pair)
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
    )


def _measures(bench: Bench, pair: Pair) -> tuple[Measure, ...]:
    seed = bench.target.config.train.seed
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
    loss, *rest = compare(ratios, seed=seed)
    measures = (loss, perplexity(loss), *rest)
    if not bench.asked:
        return measures
    marks = zip(_marks(bench, pair.base), _marks(bench, pair.adapter), strict=True)
    ratios = [Ratio(before.name, before.values, after.values, before.counted) for before, after in marks]
    return measures + compare(ratios, seed=seed)


def _marks(bench: Bench, observed: Observed) -> tuple[Marks, ...]:
    answers = [answer.text for answer in observed.answers]
    references = [question.reference for question in bench.asked]
    return mark(answers, references, [answer.stop_reason == "stop" for answer in observed.answers])


def _columns(bench: Bench, pair: Pair) -> dict[str, list[Any]]:
    """rows.parquet: one row for each that was judged."""
    examples, base, adapter = bench.rows.examples, pair.base, pair.adapter
    decode = bench.reader.tokenizer.decode
    columns: dict[str, list[Any]] = {
        "place": list(examples.places),
        "num_tokens": examples.lengths.tolist(),
        "num_supervised_tokens": examples.supervised.tolist(),
        "base_loss": (base.scores.loss / examples.supervised).tolist(),
        "adapter_loss": (adapter.scores.loss / examples.supervised).tolist(),
        "base_correct_tokens": base.scores.correct.astype(np.int64).tolist(),
        "adapter_correct_tokens": adapter.scores.correct.astype(np.int64).tolist(),
        "supervised_bytes": bench.rows.supervised_bytes.astype(np.int64).tolist(),
        "text": [str(decode(examples.example(i).input_ids)) for i in range(len(examples))],
    }
    if bench.asked:
        by_row: dict[int, tuple[Question, Generated, Generated]] = {
            question.row: (question, before, after)
            for question, before, after in zip(bench.asked, base.answers, adapter.answers, strict=True)
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
