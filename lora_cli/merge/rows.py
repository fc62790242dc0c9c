"""The text that a merge is verified on: rows of the run's own validation data where there is any, else a built-in text.

All rows run in one forward pass, so that each weight is read once. They are laid side by side and filled up on the
right, which a causal model doesn't see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.data.loading import load_examples
from lora_cli.engine.trained import Target
from lora_cli.errors import DataError, ModelError
from lora_cli.model.tokenizer import load_tokenizer, stop_tokens
from lora_cli.report.events import Emit, Warned

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MOST_POSITIONS = 2048
_LOGIT_BYTES = 64 * 2**20
"""For one pass; two passes are held at a time."""
_LONGEST = 256
_SHORTEST = 16

TEXT = """\
A lighthouse keeper counts in fours: four turns of the lamp to the minute, four ships to the hour on a good day, and
four cups of tea before the relief boat comes. On 17 March 1931 the boat was late. "Fog," said the radio, and nothing
else until 9:40, when a second voice asked for the depth at the north mole. It was 6.5 metres, less two for the tide.
def mean(values):
    total = sum(values)
    return total / len(values) if values else 0.0
Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000 metres it boils at about 90. That is why the
same egg takes longer there, although the pot looks just as angry. Die Katze schläft auf dem Dach, et le chien attend
devant la porte. Dear Ms Okafor, thank you for your letter of the 3rd. We have checked the invoice (No. 4471-B) and
found that the discount of 12 % was left out; the corrected sum is 1,204.16 euros. Q: What is the capital of Norway?
A: Oslo. Q: And how many letters has it? A: Four.
"""


@dataclass(frozen=True)
class Rows:
    """B rows of up to L tokens."""

    input_ids: NDArray[np.int64]
    """[B, L]"""
    real: NDArray[np.bool_]
    """[B, L]; False where a row is filled up."""
    scored: NDArray[np.bool_]
    """[B, L]; True at tokens whose prediction counts for the loss."""
    source: str
    """In words, for the report."""

    @property
    def positions(self) -> int:
        return int(self.real.sum())


def rows_for(target: Target, config: PretrainedConfig, emit: Emit) -> Rows:
    """The rows to verify this target on."""
    vocabulary = config.get_text_config().vocab_size
    budget = max(4 * _SHORTEST, min(MOST_POSITIONS, _LOGIT_BYTES // (4 * vocabulary)))
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = min(_LONGEST, budget // 4, limit if isinstance(limit, int) else _LONGEST)
    try:
        tokenizer = load_tokenizer(target.model)
    except ModelError:
        return _random(budget, longest, vocabulary, "the base has no tokenizer", emit)
    examples = _validation(target, tokenizer, config, emit)
    if examples is not None:
        return _laid_out(*_sample(examples, budget, longest), "the run's validation data")
    ids = np.asarray(tokenizer(TEXT, add_special_tokens=True)["input_ids"], dtype=np.int64)
    if len(ids) < _SHORTEST or ids.max() >= vocabulary:
        return _random(budget, longest, vocabulary, "the base's tokenizer doesn't fit it", emit)
    parts = [ids[start : start + longest] for start in range(0, min(len(ids), budget), longest)]
    return _laid_out(parts, [np.ones(len(part), dtype=bool) for part in parts], "a built-in text")


def _random(budget: int, longest: int, vocabulary: int, why: str, emit: Emit) -> Rows:
    emit(Warned(f"{why}: verified on random tokens instead of text"))
    ids = np.random.default_rng(0).integers(0, vocabulary, (max(1, budget // longest), longest))
    parts = list(ids)
    return _laid_out(parts, [np.ones(len(part), dtype=bool) for part in parts], "random tokens")


def _validation(
    target: Target, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, emit: Emit
) -> Examples | None:
    if target.bare or target.config.data.validation is None:
        return None
    stops = stop_tokens(tokenizer, config, target.model)
    try:
        _, examples = load_examples(target.config.data, tokenizer, stops, seed=target.config.train.seed)
    except DataError as error:
        emit(Warned(f"the run's validation data can't be read, a built-in text serves: {error.message}"))
        return None
    return examples


def _sample(examples: Examples, budget: int, longest: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.bool_]]]:
    """Rows spread evenly over the data, their beginnings, as many as the budget takes."""
    width = int(min(longest, max(_SHORTEST, np.median(examples.lengths))))
    count = min(len(examples), max(1, budget // width))
    chosen = np.unique(np.linspace(0, len(examples) - 1, count).round().astype(int))
    rows = [examples.example(int(index)) for index in chosen]
    return [row.input_ids[:width].astype(np.int64) for row in rows], [row.trained[:width] for row in rows]


def _laid_out(parts: Sequence[NDArray[np.int64]], trained: Sequence[NDArray[np.bool_]], source: str) -> Rows:
    shape = (len(parts), max(len(part) for part in parts))
    ids, real, scored = np.zeros(shape, np.int64), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for row, (part, counts) in enumerate(zip(parts, trained, strict=True)):
        ids[row, : len(part)] = part
        real[row, : len(part)] = True
        scored[row, : len(part)] = counts
    if not scored.any():  # every answer begins after what was kept of its row
        scored = real.copy()
    scored[:, 0] = False
    return Rows(ids, real, scored, source)
