"""Hand-made rows, and a few optimizer steps of the engine over them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from lora_cli.config import AdapterConfig, TrainConfig
from lora_cli.data.examples import Examples
from lora_cli.data.packing import share
from lora_cli.engine.assembly import causal_lm, trainable_parameters
from lora_cli.engine.batch import FlatBatch, flat_batch
from lora_cli.engine.computation import Computation
from lora_cli.engine.optimizers import make_optimizer, make_scheduler
from lora_cli.engine.step import Learner, StepResult, train_step
from lora_cli.engine.world import World
from lora_cli.model.adapter import attach_adapter
from lora_cli.plan import DataAccount
from tests.unit.engine.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
LENGTHS = (23, 2, 41, 5, 17, 9, 30)
"""Ragged, none a multiple of another. Rows are drawn again for each step."""
STEPS = 4
TRAIN = TrainConfig(
    learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=0.3, weight_decay=0.1, max_grad_norm=0.5
)
ADAPTER = AdapterConfig(r=4)
PACKED = Computation("documents", "chunked", torch.float32, "sdpa")


def examples(lengths: tuple[int, ...], seed: int = 0) -> Examples:
    """Random rows of these lengths, about half of their tokens trained; the last one's not at all."""
    draw = np.random.Generator(np.random.PCG64(seed))
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    trained = draw.random(offsets[-1]) < 0.5
    trained[offsets[:-1]] = False
    trained[offsets[1] - 1] = True  # each step trains something
    trained[offsets[-2] :] = False
    account = DataAccount(len(lengths), len(lengths), 0, 0, int(offsets[-1]), int(trained.sum()), max(lengths), 0)
    ids = draw.integers(3, VOCABULARY, offsets[-1]).astype(np.int32)
    return Examples(ids, trained, offsets, [f"row {i}" for i in range(len(lengths))], account, "")


def steps() -> list[Examples]:
    """The rows of each step."""
    return [examples(LENGTHS, seed=number) for number in range(STEPS)]


def with_adapter(model: PreTrainedModel, adapter: AdapterConfig = ADAPTER) -> PreTrainedModel:
    """The model with the LoRA that every loop here starts from."""
    return causal_lm(attach_adapter(model, adapter, seed=3).train())


def make_learner(model: PreTrainedModel, computation: Computation = PACKED, train: TrainConfig = TRAIN) -> Learner:
    """A learner as `lora train` makes it."""
    computation.prepare(model)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(train, parameters, CPU)
    return Learner(
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_scheduler(train, optimizer, STEPS),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        computation=computation,
        max_grad_norm=train.max_grad_norm,
    )


def batches(rows: Examples, computation: Computation, micro_batch_tokens: int, world: World) -> Iterator[FlatBatch]:
    """This process's micro-batches of a step."""
    lengths = [int(n) for n in rows.lengths]
    mine = share(lengths, world.size)[world.rank]
    for group in computation.micro_batches([lengths[i] for i in mine], micro_batch_tokens):
        yield flat_batch(rows, [mine[i] for i in group], world.device)


def engine_steps(
    model_type: str, micro_batch_tokens: int, world: World, computation: Computation = PACKED
) -> list[StepResult]:
    """A short training run."""
    learner = make_learner(with_adapter(tiny_model(model_type)), computation)
    return [
        train_step(learner, batches(rows, computation, micro_batch_tokens, world), int(rows.supervised.sum()), world)
        for rows in steps()
    ]
