"""Row by row, what a model makes of the supervised tokens: their loss, and how many it would have chosen.

On the flat stream that training runs on: no padding, logits at supervised positions only. Knows nothing about
adapters or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.examples import Examples
from lora_cli.engine.batch import flat_batch
from lora_cli.engine.computation import Computation
from lora_cli.engine.scoring import evaluating
from lora_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RowScores:
    """What a model makes of each row."""

    loss: NDArray[np.float64]
    """[N], nats, summed over the row's supervised tokens"""
    correct: NDArray[np.float64]
    """[N], supervised tokens that are the model's first choice"""


def score_rows(
    model: PreTrainedModel,
    computation: Computation,
    examples: Examples,
    *,
    micro_batch_tokens: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> RowScores:
    """Scores in the order of `examples`; how they are packed changes nothing but the order of summation.

    Raises:
        ModelError: a single row doesn't fit in memory.
    """
    while True:
        try:
            return _score(model, computation, examples, micro_batch_tokens, device, progress)
        except torch.OutOfMemoryError as error:
            longest = int(examples.lengths.max())
            if micro_batch_tokens <= longest:
                raise ModelError(
                    f"out of memory with one row at a time ({longest:,} tokens)",
                    remedy=f"--set data.max_length to less than {longest} needs less.",
                ) from error
            micro_batch_tokens //= 2
        torch.cuda.empty_cache()


def _score(
    model: PreTrainedModel,
    computation: Computation,
    examples: Examples,
    micro_batch_tokens: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> RowScores:
    scores_2N = torch.zeros(2, len(examples), dtype=torch.float64, device=device)
    done = 0
    with evaluating(model), _noting_choices(model) as noted:
        for indices in computation.micro_batches([int(n) for n in examples.lengths], micro_batch_tokens):
            batch = flat_batch(examples, indices, device)
            losses_S = computation.token_losses(model, batch)
            choices = torch.cat(noted)
            noted.clear()
            if computation.loss == "full":  # the model saw every position, not only the supervised ones
                choices = choices[batch.predictors]
            scores_2S = torch.stack([losses_S.double(), (choices == batch.targets).double()])
            scores_2N.index_add_(1, torch.tensor(indices, device=device)[batch.documents], scores_2S)
            done += len(indices)
            progress(done, len(examples))
    loss, correct = scores_2N.cpu().numpy()
    return RowScores(loss, correct)


@contextmanager
def _noting_choices(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it, every forward pass of the model adds its first choices, one per position, to the list.

    The loss runs the model's head piece by piece and keeps no logits; this looks at them as they pass.
    """
    noted: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: _note(noted, output))
    try:
        yield noted
    finally:
        hook.remove()


def _note(noted: list[Tensor], output: Any) -> None:
    noted.append(output.logits[0].argmax(dim=-1))
