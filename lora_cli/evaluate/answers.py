"""Answers to the rows' own prompts.

The prompt of a row is all before its first supervised token, the reference its first supervised run: what
training saw, token for token. Knows nothing about adapters or statistics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_cli.data.examples import Examples
from lora_cli.engine.generation import Generated, Sampling, generate_batch
from lora_cli.errors import DataError
from lora_cli.evaluate.models import Loaded, Reader
from lora_cli.evaluate.rows import supervised_runs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_ANSWER = 512
"""Tokens, unless asked otherwise."""


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that the row gives."""

    row: int
    """Index of the example."""
    prompt_ids: tuple[int, ...]
    prompt: str
    reference: str
    reference_ids: tuple[int, ...]
    """With what ends the turn."""
    place: str


def questions(examples: Examples, reader: Reader) -> tuple[Question, ...]:
    """The rows that can be asked. A truncated reference can't be matched, and a text has no prompt.

    Raises:
        DataError: no row can be asked.
    """
    cut = set(examples.truncated.tolist())
    found = []
    for index in range(len(examples)):
        example = examples.example(index)
        start, stop = supervised_runs(example.trained)[0]
        ends = stop == len(example.input_ids)
        if start < 2 or (ends and index in cut):
            continue
        prompt, reference = example.input_ids[:start].tolist(), example.input_ids[start:stop].tolist()
        decode = reader.tokenizer.decode
        found.append(
            Question(
                row=index,
                prompt_ids=tuple(prompt),
                prompt=str(decode(prompt)),
                reference=str(decode(reference, skip_special_tokens=True)),
                reference_ids=tuple(reference),
                place=examples.places[index],
            )
        )
    if not found:
        remedy = "Leave --generate, --pattern and --choices out: there is nothing to ask."
        raise DataError("no row has a prompt and a whole answer", remedy=remedy)
    return tuple(found)


def answer_limit(asked: Sequence[Question]) -> int:
    """Tokens that suffice for every reference and half as much again."""
    return min(LONGEST_ANSWER, max(8, int(1.5 * max(len(question.reference_ids) for question in asked))))


def answer_all(
    model: PreTrainedModel,
    loaded: Loaded,
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    padded: bool = False,
    progress: Callable[[int, int], None],
) -> list[Generated]:
    """An answer to each prompt, in order; one that would run past the model's positions is cut there.

    Args:
        padded: let prompts of neighbouring lengths share a batch, where the model keeps padding apart.
    """
    by_limit: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        room = sampling.max_new_tokens
        if reader.position_limit is not None:
            room = max(1, min(room, reader.position_limit - len(prompt)))
        by_limit[room].append(index)
    answers: dict[int, Generated] = {}

    def report(done: int, total: int) -> None:
        progress(len(answers) + done, len(prompts))

    for room, indices in by_limit.items():
        batch = generate_batch(
            model,
            loaded.computation,
            reader.tokenizer,
            [prompts[index] for index in indices],
            reader.stop_token_ids,
            replace(sampling, max_new_tokens=room),
            padded=padded and loaded.computation.packing != "single",
            progress=report,
        )
        answers.update(zip(indices, batch, strict=True))
    return [answers[index] for index in range(len(prompts))]
