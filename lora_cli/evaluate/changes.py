"""How the rows that changed most read, token by token, for the page.

Only these few are scored again for it: the losses of single tokens are too many to keep for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.engine.batch import flat_batch
from lora_cli.engine.scoring import evaluating
from lora_cli.evaluate.bench import Bench
from lora_cli.evaluate.figures import Pair
from lora_cli.evaluate.models import Loaded
from lora_cli.evaluate.rows import supervised_runs
from lora_cli.report.evaluation_page import Piece, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_READ = 5
"""Rows that gained most, and as many that lost most."""
_TOKENS_READ = 300


def changed_rows(pair: Pair, examples: Examples) -> list[int]:
    """The rows whose loss per token fell most, then those whose rose most."""
    change = (pair.adapter.scores.loss - pair.base.scores.loss) / examples.supervised
    order = np.argsort(change, kind="stable").tolist()
    gained = [index for index in order[:ROWS_READ] if change[index] < 0]
    lost = [index for index in order[::-1][:ROWS_READ] if change[index] > 0]
    return gained + lost


def token_losses(
    model: PreTrainedModel, loaded: Loaded, examples: Examples, indices: Sequence[int]
) -> list[NDArray[np.float64]]:
    """The loss (nats) of each supervised token of each row."""
    found = []
    with evaluating(model):
        for index in indices:
            losses = loaded.computation.token_losses(model, flat_batch(examples, [index], loaded.device))
            found.append(losses.double().cpu().numpy())
    return found


def readings(
    bench: Bench,
    indices: Sequence[int],
    before: Sequence[NDArray[np.float64]],
    after: Sequence[NDArray[np.float64]],
) -> list[Reading]:
    """The rows as text, with what the adapter changes in each token."""
    found = []
    for index, base, adapter in zip(indices, before, after, strict=True):
        example = bench.rows.examples.example(index)
        start = supervised_runs(example.trained)[0][0]
        prompt = str(bench.reader.tokenizer.decode(example.input_ids[:start]))
        changes = np.full(len(example.input_ids), np.nan)
        changes[example.trained] = adapter - base
        stop = start + _TOKENS_READ
        pieces = _pieces(bench.reader.tokenizer, example.input_ids[start:stop].tolist(), changes[start:stop].tolist())
        found.append(Reading(index, prompt, pieces, cut=len(example.input_ids) > stop))
    return found


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], changes: Sequence[float]) -> tuple[Piece, ...]:
    """Text for each token; tokens that only together spell a character share it, with the change that they sum to."""
    pieces: list[Piece] = []
    held: list[int] = []
    change = 0.0
    for token, its_change in zip(ids, changes, strict=True):
        held.append(token)
        change += its_change
        text = str(tokenizer.decode(held))
        if not text.endswith("\ufffd") or len(held) > 4:
            pieces.append(Piece(text, None if np.isnan(change) else change))
            held, change = [], 0.0
    return tuple(pieces)
