"""Optimizers and schedules by transformers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lora_cli.config import TrainConfig
from lora_cli.errors import UserError

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler


_UNPAGED = {"paged_adamw": "adamw_torch", "paged_adamw_32bit": "adamw_torch"}
"""Paged optimizers whose plain relative isn't the rest of their name."""


def make_optimizer(train: TrainConfig, parameters: Mapping[str, nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer that `train.optim` names, over float32 parameters.

    Matrices decay, vectors (biases, norms) don't. What PyTorch would choose by device is explicit: for each
    tensor alone on a CPU and by `foreach` on CUDA, but for AdamW: that is one kernel on either, which takes no memory.

    Raises:
        UserError: a paged optimizer without CUDA, whose memory it pages.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = train.learning_rate
    betas = (train.adam_beta1, train.adam_beta2)
    on_card = device.type == "cuda"
    adam: dict[str, Any] = {"lr": rate, "betas": betas, "eps": train.adam_epsilon}
    match train.optim:
        case "adamw_torch" | "adamw_torch_fused":
            return torch.optim.AdamW(groups, **adam, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, foreach=on_card)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, foreach=on_card)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=rate, foreach=on_card)
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
        case _:
            return _bitsandbytes_optimizer(train, groups, adam, device)


def _bitsandbytes_optimizer(
    train: TrainConfig, groups: list[dict[str, Any]], adam: dict[str, Any], device: torch.device
) -> Optimizer:
    from bitsandbytes.optim.adamw import AdamW
    from bitsandbytes.optim.lion import Lion

    name = train.optim
    if name.startswith("paged_") and device.type != "cuda":
        raise UserError(
            f"train.optim: {name} pages memory between GPU and host; there is no GPU here",
            remedy=f"Set train.optim: {_UNPAGED.get(name, name.removeprefix('paged_'))}",
        )
    bits = 8 if name.endswith("8bit") else 32
    paged = name.startswith("paged_")
    if "lion" in name:
        return cast(Optimizer, Lion(groups, lr=adam["lr"], betas=adam["betas"], optim_bits=bits, is_paged=paged))
    return cast(Optimizer, AdamW(groups, **adam, optim_bits=bits, is_paged=paged))


def make_scheduler(train: TrainConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """transformers' schedule of this name, one tick for each optimizer step."""
    from transformers.optimization import get_scheduler

    scheduler: LRScheduler = get_scheduler(
        train.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps(train.warmup_steps, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs),
    )
    return scheduler


def warmup_steps(value: float, total_steps: int) -> int:
    """Steps of warm-up: `value` itself, or below 1 that share of all steps, rounded up, as in transformers 5."""
    return math.ceil(value * total_steps) if value < 1 else int(value)
