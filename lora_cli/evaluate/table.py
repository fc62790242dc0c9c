"""rows.parquet: a row for each that was judged, with what every model made of it.

The base's columns begin with `base_`, the target's adapter's with `adapter_`; those of further adapters and precisions
with `adapter_2_`, `adapter_3_` in the order of `others`. Knows nothing about how figures are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_cli.evaluate.bench import Bench, Observed
from lora_cli.evaluate.figures import Pair


def columns(bench: Bench, pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """Column names to one value for each row. Another precision's base is `base_2_`, and so on."""
    examples = bench.rows.examples
    decode = bench.reader.tokenizer.decode
    found: dict[str, list[Any]] = {
        "place": list(examples.places),
        "num_tokens": examples.lengths.tolist(),
        "num_supervised_tokens": examples.supervised.tolist(),
        "supervised_bytes": bench.rows.supervised_bytes.astype(np.int64).tolist(),
        "text": [str(decode(examples.example(i).input_ids)) for i in range(len(examples))],
    }
    if bench.groups is not None:
        found["group"] = list(bench.groups)
    if bench.asked:
        questions = {question.row: question for question in bench.asked}
        asked = [questions.get(index) for index in range(len(examples))]
        found["prompt"] = [one and one.prompt for one in asked]
        found["reference"] = [one and one.reference for one in asked]
    seen: list[Observed] = []
    for number, pair in enumerate(pairs, start=1):
        if not any(pair.base is one for one in seen):
            seen.append(pair.base)
            found |= _of_model(bench, pair.base, "base" if len(seen) == 1 else f"base_{len(seen)}")
        found |= _of_model(bench, pair.adapter, "adapter" if number == 1 else f"adapter_{number}")
    return found


def _of_model(bench: Bench, observed: Observed, who: str) -> dict[str, list[Any]]:
    examples = bench.rows.examples
    found: dict[str, list[Any]] = {
        f"{who}_loss": (observed.scores.loss / examples.supervised).tolist(),
        f"{who}_correct_tokens": observed.scores.correct.astype(np.int64).tolist(),
    }
    if bench.ballot is not None and observed.choice_losses is not None:
        chosen = bench.ballot.chosen(observed.choice_losses)
        by_row = {
            question.row: bench.ballot.choices[choice]
            for question, choice in zip(bench.ballot.questions, chosen, strict=True)
        }
        found[f"{who}_choice"] = [by_row.get(index) for index in range(len(examples))]
    if bench.asked:
        answers = {question.row: answer for question, answer in zip(bench.asked, observed.answers, strict=True)}
        answered = [answers.get(index) for index in range(len(examples))]
        found[f"{who}_answer"] = [one and one.text for one in answered]
        found[f"{who}_answer_tokens"] = [one and len(one.token_ids) for one in answered]
        found[f"{who}_stop_reason"] = [one and one.stop_reason for one in answered]
    return found
