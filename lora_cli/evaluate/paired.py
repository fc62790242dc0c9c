"""The evaluation itself: the same rows through base and adapter, then figures and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lora_cli.engine.trained import find_target
from lora_cli.errors import ModelError, RunFolderError, UserError
from lora_cli.evaluate.bench import Bench, Observed, Request, prepare
from lora_cli.evaluate.changes import changed_rows, readings, token_losses
from lora_cli.evaluate.figures import Pair, compare_pair
from lora_cli.evaluate.models import Loaded, check_results, load_target, trained_folder
from lora_cli.evaluate.records import refuse_occupied, refuse_unwritable, write_records
from lora_cli.evaluate.remembered import recall, remember
from lora_cli.evaluate.rows import rows_name
from lora_cli.evaluate.table import columns
from lora_cli.report.comparison import Demand, Evaluation
from lora_cli.report.evaluation_page import Reading, render_evaluation_page
from lora_cli.report.events import Emit, Warned, ignore

BasePrecision = Literal["trained", "original", "both"]


@dataclass(frozen=True)
class Judged:
    """What was found on one base: pairs, and how the rows that changed most read in the first of them."""

    pairs: list[Pair]
    changed: list[Reading]
    base_kept: bool
    """Whether the base's part comes from an earlier evaluation."""


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
    group_by: str | None = None,
    pattern: str | None = None,
    choices: str | None = None,
    min_improvement: float | None = None,
    fail_if_worse: bool = False,
    output: Path | str | None = None,
    emit: Emit = ignore,
) -> Evaluation:
    """Judge an adapter against its base, on the same rows, at the precision that it was trained at.

    Args:
        target: a run folder, an adapter folder or a config file.
        data: the rows, as a config's `data.train` names them; otherwise the run's validation rows.
        generate: answer the rows' prompts as well, greedily.
        overrides: of the config that the adapter was trained with, as `train.seed=7`.
        adapters: further adapters of the same base, or models that they were merged into, judged beside the target's.
        base: judge on the base as it was quantized in training, on the original weights, or on both.
        limit: judge at most so many rows, drawn by the seed.
        max_new_tokens: of an answer; otherwise enough for the longest reference and half as much again.
        group_by: a column of the rows; the loss is given for each of its values as well.
        pattern: a regular expression; what it finds in an answer must be what it finds in the reference.
        choices: `a,b,c`, or `auto`: how likely the right one is among them, without generating.
        min_improvement, fail_if_worse: kept in the result, whose `meets_demand` says if they are met.
        output: the folder for figures, rows and page, instead of one in the run folder.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    found = find_target(target, overrides)
    results = [found.result, *map(trained_folder, adapters)]
    check_results(results)
    precisions = _precisions(base, found.config.model.quantization is not None)
    if min_improvement is not None and not math.isfinite(min_improvement):
        raise UserError(f"--min-improvement {min_improvement}: it must be a number of nats, such as 0.05")
    if output is not None:
        refuse_occupied(Path(output).expanduser())
        refuse_unwritable(Path(output).expanduser())
    request = Request(data, limit, generate, max_new_tokens, group_by, pattern, choices)
    bench = prepare(found, request, emit)
    judged = [_judge_at(bench, results, as_trained) for as_trained in precisions]
    evaluation = _evaluation(bench, judged, Demand(min_improvement, fail_if_worse), output)
    return _kept(bench, judged, evaluation, asked=output is not None)


def _precisions(base: BasePrecision, quantized: bool) -> list[bool]:
    """Whether to judge on the base as it was trained on, one after the other."""
    if base != "trained" and not quantized:
        raise UserError(f"--base {base}: the base was not quantized in training", remedy="Leave --base out.")
    return {"trained": [True], "original": [False], "both": [True, False]}[base]


def _judge_at(bench: Bench, results: Sequence[Path], as_trained: bool) -> Judged:
    """The base once, then everything that was trained on it."""
    loaded = load_target(bench.target, bench.reader, bench.emit, quantized=as_trained)
    kept = recall(bench, loaded)
    base = kept if kept is not None else _observe_base(bench, loaded)
    pairs: list[Pair] = []
    changed: list[Reading] = []
    for number, result in enumerate(results):
        with loaded.trained(result) as model:
            who = "the adapter" if number == 0 else str(result)
            pair = Pair(result, loaded.precision_of(result), base, bench.observe(model, loaded, who))
            if number == 0:
                indices = changed_rows(pair, bench.rows.examples)
                after = token_losses(model, loaded, bench.rows.examples, indices)
        pairs.append(pair)
        if number == 0:
            before = token_losses(loaded.base, loaded, bench.rows.examples, indices)
            changed = readings(bench, indices, before, after)
    return Judged(pairs, changed, kept is not None)


def _observe_base(bench: Bench, loaded: Loaded) -> Observed:
    observed = bench.observe(loaded.base, loaded, "the base")
    finite = np.isfinite(observed.scores.loss)
    if not finite.all():
        raise ModelError(
            f"{loaded.config.model.name_or_path}: the base's loss is not finite at "
            f"{bench.rows.examples.places[int(finite.argmin())]}",
            remedy=f"Its weights hold NaN, or {loaded.precision} overflows: see what --set model.dtype=float32 gives.",
        )
    remember(bench, loaded, observed)
    return observed


def _evaluation(bench: Bench, judged: Sequence[Judged], demand: Demand, output: Path | str | None) -> Evaluation:
    comparisons = tuple(compare_pair(bench, pair, one.pairs[0]) for one in judged for pair in one.pairs)
    rows, run = bench.rows, bench.target.run
    folder = None if run is None else run.eval_dir(rows_name(rows.name))
    return Evaluation(
        target=bench.target.name,
        data=rows.name,
        rows=len(rows.examples),
        num_supervised_tokens=int(rows.examples.supervised.sum()),
        answers=len(bench.asked),
        choices=() if bench.ballot is None else bench.ballot.choices,
        comparison=comparisons[0],
        others=comparisons[1:],
        warnings=bench.warnings,
        demand=demand,
        base_kept=all(one.base_kept for one in judged),
        folder=folder if output is None else Path(output).expanduser().absolute(),
    )


def _kept(bench: Bench, judged: Sequence[Judged], evaluation: Evaluation, *, asked: bool) -> Evaluation:
    """The evaluation once it is written down; a run of someone else's can be judged all the same."""
    if evaluation.folder is None:
        return evaluation
    pairs = [pair for one in judged for pair in one.pairs]
    rows = columns(bench, pairs)
    page = render_evaluation_page(evaluation, rows, judged[0].changed)
    try:
        write_records(evaluation.folder, evaluation.as_json(), rows, page)
    except RunFolderError as error:
        if asked:
            raise
        bench.emit(Warned(f"{error.message}; the figures are not kept"))
        return replace(evaluation, folder=None)
    return evaluation
