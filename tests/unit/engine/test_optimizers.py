"""Optimizers and schedules by transformers' names."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers.optimization import get_scheduler

from lora_cli.config import TrainConfig
from lora_cli.engine.optimizers import make_optimizer, make_scheduler, warmup_steps
from lora_cli.errors import UserError

CPU = torch.device("cpu")
NAMES = get_args(TrainConfig.model_fields["optim"].annotation)
PAGED = [name for name in NAMES if name.startswith("paged_")]
SCHEDULES = get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation)
SCHEDULE_SETTINGS: dict[str, dict[str, float]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
    "cosine_with_restarts": {"num_cycles": 2},
}


def parameters() -> dict[str, nn.Parameter]:
    """A matrix large enough for 8-bit states, and a vector."""
    torch.manual_seed(0)
    return {"matrix": nn.Parameter(torch.randn(80, 80)), "vector": nn.Parameter(torch.randn(5))}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PAGED])
def test_every_optimizer_descends_on_a_cpu(name: str) -> None:
    """bitsandbytes' 8-bit ones, too."""
    found = parameters()
    optimizer = make_optimizer(TrainConfig(optim=name, learning_rate=1e-2), found, CPU)
    before = sum(float(p.detach().norm()) for p in found.values())
    for _ in range(5):
        optimizer.zero_grad()
        sum((p**2).sum() for p in found.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert sum(float(p.detach().norm()) for p in found.values()) < before - 1
    if name.endswith("8bit"):
        assert optimizer.state[found["matrix"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", PAGED)
def test_a_paged_optimizer_without_cuda_names_one_that_works(name: str) -> None:
    with pytest.raises(UserError, match="no GPU here") as caught:
        make_optimizer(TrainConfig(optim=name), parameters(), CPU)
    remedy = str(caught.value.remedy)
    assert remedy.removeprefix("Set train.optim: ") in set(NAMES) - set(PAGED)


def test_matrices_decay_and_vectors_do_not() -> None:
    found = parameters()
    optimizer = make_optimizer(TrainConfig(weight_decay=0.1), found, CPU)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(found["matrix"]): 0.1, id(found["vector"]): 0.0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_transformers_own(name: str) -> None:
    settings: dict[str, Any] = SCHEDULE_SETTINGS.get(name, {})
    train = TrainConfig(lr_scheduler_type=name, lr_scheduler_kwargs=settings, learning_rate=1e-3, warmup_steps=3)
    ours = make_scheduler(train, make_optimizer(train, parameters(), CPU), 20)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, optimizer, 3, 20, scheduler_specific_kwargs=settings)
    for _ in range(20):
        assert ours.get_last_lr()[0] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        ours.optimizer.step()
        ours.step()
        optimizer.step()
        theirs.step()


def test_warm_up_below_one_is_a_share_rounded_up() -> None:
    assert [warmup_steps(value, 70) for value in (0, 0.03, 0.5, 1, 12)] == [0, 3, 35, 1, 12]
