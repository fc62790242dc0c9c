"""The training step: forward, loss, backward, sum over processes, clip, optimizer. One function, on any device.

A step's loss is the sum over its supervised tokens divided by their number over all micro-batches and processes.
That number is known beforehand from the order of the data, so every micro-batch is normalised right away, a process
may have no micro-batch at all, and gradients are summed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_cli.engine.computation import Computation

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel

    from lora_cli.engine.batch import FlatBatch
    from lora_cli.engine.world import World


@dataclass(frozen=True)
class Learner:
    """What a step works on: the model, what is trained in it, and what moves it."""

    model: PreTrainedModel
    """The causal language model itself, adapters injected."""
    parameters: Mapping[str, nn.Parameter]
    """The trainable ones, float32, by name, in a fixed order."""
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    """Enabled for float16 alone."""
    computation: Computation
    max_grad_norm: float | None


class OutOfMemory(Exception):
    """Some process ran out of memory in this step. No parameter has moved and no gradient is left, on any process."""


class Abandoned(Exception):
    """Some process was asked to stop between two micro-batches, whose iterator raised this. As for `OutOfMemory`,
    nothing has moved, on any process."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Nats per supervised token, over all processes."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    learning_rate: float
    """The one used."""
    applied: bool
    """False when the loss or the gradient wasn't finite, and nothing was changed."""
    scaler_skipped: bool = False
    """Float16 only: the gradient overflowed at this loss scale, which is now halved. Nothing is wrong."""


def accumulate(learner: Learner, batch: FlatBatch, num_supervised: int) -> Tensor:
    """Add one micro-batch's gradient of (sum of losses / `num_supervised`) to the parameters; its loss, detached."""
    loss = learner.computation.loss_sum(learner.model, batch) / num_supervised
    learner.scaler.scale(loss).backward()
    return loss.detach()


def train_step(learner: Learner, batches: Iterable[FlatBatch], num_supervised: int, world: World) -> StepResult:
    """One optimizer step over this process's micro-batches. Gradients are empty before and after.

    Args:
        num_supervised: supervised tokens of the whole step, over all processes.

    Raises:
        OutOfMemory: on every process when any one of them ran out; the step can be taken again, in smaller pieces.
        Abandoned: on every process when `batches` raised it on any one of them.
    """
    loss = torch.zeros((), dtype=torch.float32, device=world.device)

    def accumulate_all() -> None:
        for batch in batches:
            loss.add_(accumulate(learner, batch, num_supervised))

    try:
        on_every_process(accumulate_all, world)
    except (OutOfMemory, Abandoned):
        learner.optimizer.zero_grad(set_to_none=True)
        raise
    return update(learner, loss, world)


def update(learner: Learner, loss: Tensor, world: World) -> StepResult:
    """The second half of a step: gradients summed over processes, clipped, applied, and cleared.

    Args:
        loss: of this process's micro-batches, a float32 scalar on the device.
    """
    parameters = list(learner.parameters.values())
    sum_gradients(parameters, loss, world)
    learner.scaler.unscale_(learner.optimizer)
    grad_norm = global_norm(parameters)
    loss_value, norm_value = torch.stack([loss, grad_norm]).tolist()  # the step's one wait for the device
    learning_rate = float(learner.scheduler.get_last_lr()[0])
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    overflowed = learner.scaler.is_enabled() and math.isfinite(loss_value) and not math.isfinite(norm_value)
    if finite:
        if learner.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, learner.max_grad_norm, grad_norm)
        learner.scaler.step(learner.optimizer)
        learner.scheduler.step()
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, learning_rate, finite, overflowed)


def on_every_process(work: Callable[[], None], world: World) -> None:
    """Do this process's work; what ends it early on one process ends it on all.

    Raises:
        OutOfMemory, Abandoned: on every process, the latter where both happened.
    """
    ran_out = abandoned = False
    try:
        work()
    except Abandoned:
        abandoned = True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ran_out = True
    # Raised out here: an exception that is being handled keeps alive the frames it came from, and all their tensors.
    ran_out_anywhere, abandoned_anywhere = world.sum([float(ran_out), float(abandoned)])
    if abandoned_anywhere:
        raise Abandoned
    if ran_out_anywhere:
        raise OutOfMemory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: PyTorch has a class for its own on a card, and only words elsewhere."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in words)


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, a float32 scalar on their device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads, foreach=grads[0].is_cuda if grads else False).float()


def sum_gradients(parameters: list[nn.Parameter], loss: Tensor, world: World) -> None:
    """Sum gradients and loss over all processes, in place, in one flat all-reduce.

    A parameter that has no gradient anywhere is left without one, as it would be in a single process: a zero
    gradient would let weight decay and momentum move it.
    """
    if not world.distributed:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=world.device)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.sum_in_place([*(p.grad for p in parameters if p.grad is not None), loss, present])
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if not count:
            parameter.grad = None
