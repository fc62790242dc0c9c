"""Rows whose answer is one of a few: which of them a model finds likeliest.

Every choice is put in the answer's place, with whatever ends the turn, and scored whole: what is compared is the
probability of saying just that and stopping, so that long choices need no correction for their length. Nothing is
generated. Knows tokens; knows nothing about adapters or statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.errors import DataError, UserError
from lora_cli.evaluate.answers import Question
from lora_cli.evaluate.matching import Marks
from lora_cli.plan import DataAccount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHOICES = 50


@dataclass(frozen=True)
class Ballot:
    """The rows that can be asked to choose, with every choice in the place of the answer."""

    choices: tuple[str, ...]
    questions: tuple[Question, ...]
    right: NDArray[np.int64]
    """[M], which choice each question's reference is."""
    examples: Examples
    """M x K rows: a question with its first choice, its second, and so on."""

    def marks(self, losses_MK: NDArray[np.float64]) -> tuple[Marks, ...]:
        """How often the right choice is the likeliest, and how likely it is among the choices."""
        everywhere = np.ones(len(self.questions))
        accuracy = (self.chosen(losses_MK) == self.right).astype(np.float64)
        odds = np.exp(losses_MK.min(axis=1, keepdims=True) - losses_MK)
        probabilities = np.take_along_axis(odds, self.right[:, None], axis=1)[:, 0] / odds.sum(axis=1)
        return (
            Marks("choice_accuracy", accuracy, everywhere),
            Marks("choice_probability", probabilities, everywhere),
        )

    def chosen(self, losses_MK: NDArray[np.float64]) -> NDArray[np.int64]:
        """[M], the likeliest choice of each question."""
        likeliest: NDArray[np.int64] = losses_MK.argmin(axis=1)
        return likeliest


def find_choices(text: str, questions: Sequence[Question]) -> tuple[str, ...]:
    """The choices that `--choices` names: `a,b,c`, or all answers that the rows give with `auto`.

    Raises:
        UserError: fewer than two, or with `auto` more than anyone would choose from.
    """
    if text.strip() != "auto":
        given = tuple(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
        if len(given) < 2:
            raise UserError(f"--choices {text}: there must be two or more", remedy="Such as --choices yes,no,maybe.")
        return given
    found = tuple(sorted({question.reference.strip() for question in questions} - {""}))
    if not 2 <= len(found) <= MOST_CHOICES:
        raise UserError(
            f"--choices auto: the rows have {len(found):,} different answers, where 2 to {MOST_CHOICES} can be chosen "
            "from",
            remedy="Name the choices: --choices yes,no,maybe.",
        )
    return found


def make_ballot(choices: tuple[str, ...], questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> Ballot:
    """The rows whose answer is one of the choices, and whose tokens can be made from its text.

    Raises:
        DataError: there are none.
    """
    kept: list[tuple[Question, int, list[list[int]]]] = []
    for question in questions:
        reference = question.reference.strip()
        spelled = _spelled(question, choices, tokenizer) if reference in choices else None
        if spelled is not None:
            kept.append((question, choices.index(reference), spelled))
    if not kept:
        examples = ", ".join(repr(question.reference.strip()[:40]) for question in questions[:3])
        raise DataError(
            f"no row's answer is one of the choices {', '.join(choices)}", remedy=f"Answers are: {examples}."
        )
    return Ballot(
        choices=choices,
        questions=tuple(question for question, _, _ in kept),
        right=np.array([right for _, right, _ in kept], dtype=np.int64),
        examples=_examples(kept),
    )


def _spelled(question: Question, choices: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """The tokens of each choice in the answer's place; None where those of the answer itself can't be made so."""
    special = set(tokenizer.all_special_ids)
    answer = list(question.reference_ids)
    end = len(answer)
    while end and answer[end - 1] in special:
        end -= 1
    text = str(tokenizer.decode(answer[:end]))
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]

    def tokens(choice: str) -> list[int]:
        return list(tokenizer(f"{before}{choice}{after}", add_special_tokens=False)["input_ids"])

    if tokens(text.strip()) != answer[:end]:
        return None
    return [[*tokens(choice), *answer[end:]] for choice in choices]


def _examples(kept: Sequence[tuple[Question, int, list[list[int]]]]) -> Examples:
    ids, trained, lengths, places = [], [], [], []
    for question, _, spelled in kept:
        for answer in spelled:
            ids.append(np.array([*question.prompt_ids, *answer], dtype=np.int32))
            trained.append(np.repeat([False, True], [len(question.prompt_ids), len(answer)]))
            lengths.append(len(ids[-1]))
            places.append(question.place)
    return Examples(
        input_ids=np.concatenate(ids),
        trained=np.concatenate(trained),
        offsets=np.cumsum([0, *lengths]),
        places=places,
        account=DataAccount(len(ids), len(ids), 0, 0, sum(lengths), sum(int(one.sum()) for one in trained), 0, 0),
        fingerprint="",
    )
