"""Losses of examples without training: for the validation loss of a run, and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lora_cli.data.examples import Examples
from lora_cli.data.packing import share
from lora_cli.engine.batch import flat_batch
from lora_cli.engine.computation import Computation
from lora_cli.engine.step import on_every_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_cli.engine.world import World


def example_losses(
    model: PreTrainedModel,
    computation: Computation,
    examples: Examples,
    *,
    micro_batch_tokens: int,
    world: World,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Summed loss (nats) of each example's supervised tokens, in the order of `examples`, on every process.

    Packing changes nothing but the order of summation. The model is in eval mode meanwhile.

    Raises:
        OutOfMemory: on every process when any one of them ran out.
        Abandoned: on every process when `progress` raised it on any one of them.
    """
    lengths = examples.lengths
    mine = share([int(n) for n in lengths], world.size)[world.rank]
    losses = torch.zeros(len(examples), dtype=torch.float64, device=world.device)

    def score_mine() -> None:
        done = 0
        for group in computation.micro_batches([int(lengths[i]) for i in mine], micro_batch_tokens):
            indices = [mine[i] for i in group]
            batch = flat_batch(examples, indices, world.device)
            token_losses = computation.token_losses(model, batch).double()
            index = torch.tensor(indices, device=world.device)[batch.documents]
            losses.index_add_(0, index, token_losses)
            done += len(indices)
            if progress is not None:
                progress(done, len(mine))

    with evaluating(model):
        on_every_process(score_mine, world)
    world.sum_in_place([losses])
    result: NDArray[np.float64] = losses.cpu().numpy()
    return result


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model is in eval mode and keeps no gradients; after it, as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
