"""A rehearsal: the step that `lora train` takes, on `meta`, with model, adapter and optimizer as the config says.

The micro-batch is the worst one that the config allows: full, of the longest documents, every token supervised. Two
steps are taken, because the optimizer's state appears in the first; the second accumulates over two micro-batches where
the run will.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from lora_cli.config import Config
from lora_cli.engine.assembly import attach, causal_lm, leave_out_side_outputs, trainable_parameters
from lora_cli.engine.batch import FlatBatch, flatten
from lora_cli.engine.computation import Computation
from lora_cli.engine.memory.loading import label_weights, load_on_meta, without_initial_values
from lora_cli.engine.memory.pretend import pretend
from lora_cli.engine.memory.trace import Trace
from lora_cli.engine.memory.tracer import Tracer
from lora_cli.engine.offloading import most_on_host
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.step import Learner, train_step
from lora_cli.engine.target import Target
from lora_cli.engine.world import World
from lora_cli.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

_STEPS = 1_000
"""Length of the schedule, of which two are taken."""


@dataclass(frozen=True)
class MicroBatches:
    """The shape of a run's steps."""

    document_lengths: tuple[int, ...]
    """Of a full micro-batch."""
    per_step: int
    """Micro-batches that an optimizer step accumulates."""

    @property
    def num_tokens(self) -> int:
        return sum(self.document_lengths)


def worst_micro_batches(config: Config, micro_batch_tokens: int, computation: Computation) -> MicroBatches:
    """The fullest micro-batch of the longest documents; one that is longer than the budget runs alone."""
    longest = config.data.max_length
    whole, rest = divmod(micro_batch_tokens, longest)
    if computation.packing == "single" or whole == 0:
        lengths: tuple[int, ...] = (longest,)
    else:
        lengths = (longest,) * whole + ((rest,) if rest > 1 else ())
    lengths = lengths[: max(1, config.train.batch_size)]
    return MicroBatches(lengths, -(-config.train.batch_size // len(lengths)))


def rehearse(
    config: Config, architecture: PretrainedConfig, computation: Computation, target: Target, shape: MicroBatches
) -> Trace:
    """The trace of loading the model and of two steps; `train.gradient_checkpointing` must be resolved.

    Raises:
        ModelError: the model does something that a tensor without values can't follow.
    """
    try:
        return _rehearse(config, architecture, computation, target, shape)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot trace {architecture.model_type}, because its code asks for what a tensor without values "
            f"can't say: {lines[0]}",
            remedy="Its memory can't be told beforehand. `lora train` halves its micro-batches when memory runs out.",
        ) from error


def _rehearse(
    config: Config, architecture: PretrainedConfig, computation: Computation, target: Target, shape: MicroBatches
) -> Trace:
    tracer = Tracer(
        "meta",
        target,
        architecture.get_text_config().vocab_size,
        truth=len(shape.document_lengths) == 1,
    )
    full = config.adapter is None
    with _quiet(), tracer, pretend(target), paged_aside(config.train.optim, tracer):
        tracer.trace.mark("load")
        base = load_on_meta(
            architecture,
            tracer,
            dtype=torch.float32 if full else computation.dtype,
            attention=computation.attention,
            quantization=config.model.quantization,
            trust_remote_code=config.model.trust_remote_code,
        )
        leave_out_side_outputs(base)
        with without_initial_values():
            model = attach(base, config, computation)
        label_weights(model, tracer)
        learner = learner_of(model, config, computation, target, tracer)
        take_steps(learner, target, shape, tracer)
    tracer.trace.host_bytes = most_on_host(model)
    return tracer.trace


def learner_of(
    model: PreTrainedModel | PeftModel, config: Config, computation: Computation, target: Target, tracer: Tracer
) -> Learner:
    """What `train` would step with, watched by the tracer."""
    parameters = trainable_parameters(model)
    tracer.watch_layers(model)
    tracer.watch_gradients(parameters.values())
    optimizer = make_optimizer(config.train, parameters, target.device)
    optimizer.register_step_pre_hook(lambda *_: tracer.begin("update"))
    optimizer.register_step_post_hook(lambda *_: tracer.begin("forward"))
    return Learner(
        model=causal_lm(model),
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_scheduler(config.train, optimizer, _STEPS),
        scaler=torch.amp.GradScaler(target.kind, enabled=computation.dtype == torch.float16),
        computation=computation,
        max_grad_norm=config.train.max_grad_norm,
    )


def take_steps(learner: Learner, target: Target, shape: MicroBatches, tracer: Tracer) -> None:
    """Two optimizer steps; in the first the optimizer's state is born."""
    world = World(0, 1, target.device, state=None)
    for step in (1, 2):
        tracer.trace.mark(f"step {step}")
        tracer.begin("forward")
        count = min(step, shape.per_step)
        supervised = count * sum(length - 1 for length in shape.document_lengths)
        train_step(learner, worst_batches(count, shape, target.device), supervised, world)
    tracer.trace.mark("end")


def worst_batches(count: int, shape: MicroBatches, device: torch.device) -> Iterator[FlatBatch]:
    """Full micro-batches of one shape, every token supervised."""
    documents = [np.zeros(length, np.int64) for length in shape.document_lengths]
    trained = [np.ones(length, bool) for length in shape.document_lengths]
    for _ in range(count):
        yield flatten(documents, trained, device)


@contextmanager
def paged_aside(optimizer: str, tracer: Tracer) -> Iterator[None]:
    """A paged optimizer's state lies in managed memory, outside of PyTorch's allocator; the driver moves it to the host
    where the card is full."""
    if not optimizer.startswith("paged_"):
        yield
        return
    from bitsandbytes import functional

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        with tracer.aside():
            return torch.empty(shape, dtype=dtype, device="meta")

    manager = functional.GlobalPageManager.get_instance()
    before = list(manager.paged_tensors)
    with mock.patch.multiple(functional, get_paged=get_paged, fill=lambda *_, **__: None):
        yield
    manager.paged_tensors[:] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say of a model that nobody will run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
