"""Losses and gradients of the engine against a plain padded transformers loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_cli.engine.computation import Computation
from lora_cli.engine.step import accumulate, train_step
from lora_cli.engine.world import World
from tests.unit.engine.learning import LENGTHS, PACKED, batches, engine_steps, examples, make_learner, with_adapter
from tests.unit.engine.padded import padded_gradients, padded_steps
from tests.unit.engine.tiny import tiny_model

ROOT = Path(__file__).parents[3]
SHAPES = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
PADDED_LOOP = 1e-6
"""Relative difference of losses, in float32."""


def assert_same_run(model_type: str, losses: list[float], rates: list[float] | None = None) -> None:
    expected = padded_steps(model_type)
    assert [step.loss for step in expected] == pytest.approx(losses, rel=PADDED_LOOP, abs=0)
    assert len({round(step.loss, 3) for step in expected}) > 1, "a run that learns nothing proves nothing"
    if rates is not None:
        assert [step.learning_rate for step in expected] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("micro_batch_tokens", [1, 31, 64, 4096])
@pytest.mark.parametrize("model_type", SHAPES)
def test_losses_are_those_of_a_padded_loop(model_type: str, micro_batch_tokens: int, world: World) -> None:
    results = engine_steps(model_type, micro_batch_tokens, world)
    assert_same_run(model_type, [r.loss for r in results], [r.learning_rate for r in results])
    norms = [step.grad_norm for step in padded_steps(model_type)]
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(
    "computation",
    [replace(PACKED, loss="full"), replace(PACKED, packing="mask"), replace(PACKED, packing="single", loss="full")],
    ids=lambda c: f"{c.packing}-{c.loss}",
)
def test_the_slower_ways_give_the_same_losses(computation: Computation, world: World) -> None:
    results = engine_steps("llama", 64, world, computation)
    assert_same_run("llama", [r.loss for r in results])


@pytest.mark.parametrize("micro_batch_tokens", [1, 64])
@pytest.mark.parametrize("model_type", SHAPES)
def test_gradients_are_those_of_a_padded_batch(model_type: str, micro_batch_tokens: int, world: World) -> None:
    rows = examples(LENGTHS)
    expected = padded_gradients(with_live_adapter(model_type), rows)
    learner = make_learner(with_live_adapter(model_type))
    for batch in batches(rows, PACKED, micro_batch_tokens, world):
        accumulate(learner, batch, int(rows.supervised.sum()))
    actual = {name: p.grad for name, p in learner.parameters.items()}
    assert actual.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    apart = torch.stack([(actual[name] - g).norm() for name, g in expected.items()]).norm()
    assert apart / norm < 1e-5


def with_live_adapter(model_type: str) -> torch.nn.Module:
    """With no B at zero, which would hide the gradients of A."""
    model = with_adapter(tiny_model(model_type))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def test_two_processes_give_the_losses_of_one() -> None:
    """Over gloo; with fewer rows than processes in no step, but with ragged shares in each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), *SHAPES], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(found) == set(SHAPES)
    for model_type, runs in found.items():
        for losses in runs:
            assert_same_run(model_type, losses)


def test_a_step_that_is_not_finite_changes_nothing(world: World) -> None:
    rows = examples(LENGTHS)
    learner = make_learner(with_adapter(tiny_model("llama")))
    name, poisoned = next(iter(learner.parameters.items()))
    with torch.no_grad():
        poisoned.view(-1)[0] = float("nan")
    before = {n: p.detach().clone() for n, p in learner.parameters.items()}
    rate = learner.scheduler.get_last_lr()
    result = train_step(learner, batches(rows, PACKED, 64, world), int(rows.supervised.sum()), world)
    assert not result.applied and not result.scaler_skipped
    assert all(torch.equal(before[n], p) for n, p in learner.parameters.items() if n != name)
    assert learner.scheduler.get_last_lr() == rate
    assert all(p.grad is None for p in learner.parameters.values())
