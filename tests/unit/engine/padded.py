"""What everybody writes: a padded batch, the model's own loss, AdamW and a schedule. Shares no code with the engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from lora_cli.data.examples import Examples
from tests.unit.engine.learning import STEPS, TRAIN, steps, with_adapter
from tests.unit.engine.tiny import tiny_model


@dataclass(frozen=True)
class PaddedStep:
    """What the reference measured."""

    loss: float
    grad_norm: float
    learning_rate: float


def padded_batch(rows: Examples) -> dict[str, torch.Tensor]:
    """Rows padded on the right, with -100 wherever nothing is trained."""
    shape = (len(rows), int(rows.lengths.max()))
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index in range(len(rows)):
        row = rows.example(index)
        for place, (token, trained) in enumerate(zip(row.input_ids, row.trained, strict=True)):
            input_ids[index, place] = int(token)
            attention_mask[index, place] = 1
            if trained:
                labels[index, place] = int(token)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def padded_gradients(model: PreTrainedModel, rows: Examples) -> dict[str, torch.Tensor]:
    """The gradients of one padded batch, by name."""
    model(**padded_batch(rows)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@cache
def padded_steps(model_type: str) -> tuple[PaddedStep, ...]:
    """The same short training run as `learning.engine_steps`."""
    model = with_adapter(tiny_model(model_type))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    found = []
    for rows in steps():
        rate = scheduler.get_last_lr()[0]
        loss = model(**padded_batch(rows)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(PaddedStep(loss.item(), norm.item(), rate))
    return tuple(found)
