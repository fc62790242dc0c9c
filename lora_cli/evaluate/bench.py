"""What every model is put through: rows to score, prompts to answer, choices to weigh.

All that can be known and refused before weights are read is settled here. Knows nothing about adapters or statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.engine.generation import Generated, Sampling
from lora_cli.engine.trained import Target
from lora_cli.errors import UserError
from lora_cli.evaluate.answers import Question, answer_all, answer_limit, questions
from lora_cli.evaluate.choices import Ballot, find_choices, make_ballot
from lora_cli.evaluate.columns import column_values
from lora_cli.evaluate.models import Loaded, Reader, read_target
from lora_cli.evaluate.overlap import INSTALL, overlap_is_measured
from lora_cli.evaluate.rows import EvaluationRows, load_rows
from lora_cli.evaluate.scoring import RowScores, score_rows
from lora_cli.report.events import Emit, Warned, Working

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What is asked of every model."""

    data: str | None = None
    """The rows; otherwise the run's own."""
    limit: int | None = None
    generate: bool = False
    max_new_tokens: int | None = None
    group_by: str | None = None
    pattern: str | None = None
    """A regular expression to find in answers and references."""
    choices: str | None = None
    """Answers to choose from, `a,b,c`, or `auto`."""


@dataclass(frozen=True)
class Observed:
    """What one model made of the rows."""

    scores: RowScores
    answers: list[Generated]
    """To the questions, in their order."""
    choice_losses: NDArray[np.float64] | None
    """[M, K], of each question of the ballot with each choice"""


@dataclass(frozen=True)
class Bench:
    """What every model is put through."""

    target: Target
    reader: Reader
    rows: EvaluationRows
    groups: tuple[str, ...] | None
    """[N], which group each row belongs to, where a column was named."""
    asked: tuple[Question, ...]
    """Prompts to answer; empty without `generate`."""
    sampling: Sampling
    pattern: re.Pattern[str] | None
    ballot: Ballot | None
    warnings: tuple[str, ...]
    emit: Emit

    def observe(self, model: PreTrainedModel, loaded: Loaded, who: str) -> Observed:
        """What a model makes of the rows."""

        def progress(what: str) -> Callable[[int, int], None]:
            return lambda done, total: self.emit(Working(f"{what} {who}", done, total, "rows"))

        def score(examples: Examples, what: str) -> RowScores:
            return score_rows(
                model,
                loaded.computation,
                examples,
                micro_batch_tokens=loaded.micro_batch_tokens,
                device=loaded.device,
                progress=progress(what),
            )

        scores = score(self.rows.examples, "scoring")
        losses = None
        if self.ballot is not None:
            losses = score(self.ballot.examples, "offering choices to").loss.reshape(-1, len(self.ballot.choices))
        prompts = [question.prompt_ids for question in self.asked]
        answers = answer_all(
            model, loaded, self.reader, prompts, self.sampling, padded=True, progress=progress("asking")
        )
        return Observed(scores, answers, losses)


def prepare(target: Target, request: Request, emit: Emit) -> Bench:
    """Read the rows and whatever else is asked for.

    Raises:
        UserError: a source, a row, a column, a pattern or a choice that can't be used.
    """
    pattern = _compiled(request.pattern)
    reader = read_target(target)
    rows = load_rows(target, reader, request.data, limit=request.limit, emit=emit)
    groups = None
    if request.group_by is not None:
        groups = tuple(column_values(request.group_by, rows.examples, rows.sources))
    generate = request.generate or pattern is not None
    found = questions(rows.examples, reader) if generate or request.choices is not None else ()
    ballot = None
    if request.choices is not None:
        ballot = make_ballot(find_choices(request.choices, found), found, reader.tokenizer)
    asked = found if generate else ()
    if pattern is not None and not any(pattern.search(question.reference) for question in asked):
        raise UserError(
            f"--pattern {request.pattern}: it is found in no row's answer",
            remedy=f"The first answer is: {asked[0].reference.strip()[:80]!r}.",
        )
    warnings = (*target.doubts, *rows.warnings, *_left_out(len(rows.examples), generate, len(found), ballot))
    for text in warnings:
        emit(Warned(text))
    tokens = request.max_new_tokens or (answer_limit(asked) if asked else 1)
    return Bench(target, reader, rows, groups, asked, Sampling(max_new_tokens=tokens), pattern, ballot, warnings, emit)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--pattern {pattern}: no regular expression: {error}") from error


def _left_out(rows: int, generate: bool, questions: int, ballot: Ballot | None) -> list[str]:
    """Which rows not every measure speaks of, and which measures are missing."""
    found = []
    if generate and questions < rows:
        found.append(f"{rows - questions:,} of {rows:,} rows have no prompt with a whole answer, and aren't asked")
    if ballot is not None and len(ballot.questions) < rows:
        found.append(f"{rows - len(ballot.questions):,} of {rows:,} rows have none of the choices as their answer")
    if generate and not overlap_is_measured():
        found.append(INSTALL)
    return found
