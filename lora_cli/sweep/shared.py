"""What members share side by side: the forward and backward passes of a step, and the scoring of validation rows.

Gradients and losses of each member are those of a step of its own, up to the order of summation. Knows nothing of
when a step is due, or of what becomes of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.data.examples import Examples
from lora_cli.engine.batch import FlatBatch, flatten
from lora_cli.engine.scoring import evaluating
from lora_cli.engine.step import Abandoned, Learner, OutOfMemory, StepResult, on_every_process, update
from lora_cli.engine.world import World
from lora_cli.sweep.arrange import MicroBatch, Wish, arrange
from lora_cli.sweep.row import Row

if TYPE_CHECKING:
    from lora_cli.engine.computation import Computation


def shared_step(
    row: Row,
    learners: Mapping[int, Learner],
    wishes: Sequence[Wish],
    data: Mapping[int, Examples],
    supervised: Mapping[int, int],
    *,
    micro_batch_tokens: int,
    world: World,
    heed: Callable[[], None] = lambda: None,
) -> dict[int, StepResult]:
    """One optimizer step of each member that has a wish; what `train_step` does for one.

    Args:
        learners, data, supervised: by member: what it trains, its examples, supervised tokens of its step.

    Raises:
        OutOfMemory: no parameter of any member has moved, and no gradient is left.
        Abandoned: likewise; `heed`, which is called between micro-batches, raised it.
    """
    computation = next(iter(learners.values())).computation
    losses = {wish.member: torch.zeros((), device=world.device) for wish in wishes}

    def accumulate_all() -> None:
        with row.running():
            for micro_batch in _arranged(wishes, micro_batch_tokens, computation):
                heed()
                sums = _losses(row, computation, micro_batch, data, world)
                shares = [total / supervised[seat.member] for seat, total in zip(micro_batch, sums, strict=True)]
                scaled = [
                    learners[seat.member].scaler.scale(each) for seat, each in zip(micro_batch, shares, strict=True)
                ]
                torch.stack(scaled).sum().backward()
                for seat, each in zip(micro_batch, shares, strict=True):
                    losses[seat.member] += each.detach()

    try:
        on_every_process(accumulate_all, world)
    except (OutOfMemory, Abandoned):
        for wish in wishes:
            learners[wish.member].optimizer.zero_grad(set_to_none=True)
        raise
    return {member: update(learners[member], loss, world) for member, loss in losses.items()}


def shared_losses(
    row: Row,
    computation: Computation,
    wishes: Sequence[Wish],
    data: Mapping[int, Examples],
    *,
    micro_batch_tokens: int,
    world: World,
    heed: Callable[[], None] = lambda: None,
) -> dict[int, NDArray[np.float64]]:
    """Summed loss (nats) of each member's rows, in the order of its wish; what `example_losses` does for one.

    Raises:
        OutOfMemory: memory ran out.
        Abandoned: `heed`, which is called between micro-batches, raised it.
    """
    losses = {wish.member: np.zeros(len(wish.rows)) for wish in wishes}
    place = {wish.member: {row: number for number, row in enumerate(wish.rows)} for wish in wishes}

    def score_all() -> None:
        with row.running() as model, evaluating(model):
            for micro_batch in _arranged(wishes, micro_batch_tokens, computation):
                heed()
                batch = _seated(row, micro_batch, data, world)
                token_losses = computation.token_losses(model, batch).double()
                seated = [(seat.member, index) for seat in micro_batch for index in seat.rows]
                sums = torch.zeros(len(seated), dtype=torch.float64, device=world.device)
                sums.index_add_(0, batch.documents, token_losses)
                for (member, index), total in zip(seated, sums.tolist(), strict=True):
                    losses[member][place[member][index]] = total

    on_every_process(score_all, world)
    return losses


def _arranged(wishes: Sequence[Wish], micro_batch_tokens: int, computation: Computation) -> list[MicroBatch]:
    return arrange(wishes, micro_batch_tokens, group=computation.micro_batches, alone=computation.packing == "single")


def _losses(
    row: Row, computation: Computation, micro_batch: MicroBatch, data: Mapping[int, Examples], world: World
) -> Tensor:
    """[seats] sums of each member's supervised tokens' losses, with gradients."""
    batch = _seated(row, micro_batch, data, world)
    owners = torch.repeat_interleave(torch.tensor([len(seat.rows) for seat in micro_batch])).to(world.device)
    return computation.group_losses(row.stack.base, batch, owners[batch.documents], len(micro_batch))


def _seated(row: Row, micro_batch: MicroBatch, data: Mapping[int, Examples], world: World) -> FlatBatch:
    """A micro-batch as one row, and the base told who sits where in it."""
    parts = [[data[seat.member].example(row) for row in seat.rows] for seat in micro_batch]
    row.seats = tuple(
        (seat.member, sum(len(part.input_ids) for part in own)) for seat, own in zip(micro_batch, parts, strict=True)
    )
    flat = [part for own in parts for part in own]
    return flatten([part.input_ids for part in flat], [part.trained for part in flat], world.device)
