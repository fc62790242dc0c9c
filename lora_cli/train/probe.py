"""`lora check --probe`: a few steps of the run itself, timed, to say how long all of it will take.

Loads the weights and trains on the run's first steps, as `train` does. Nothing is kept: the weights go with the
process, the metrics with a temporary folder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.config import Config
from lora_cli.engine.memory.need import Rehearsals
from lora_cli.engine.planning import Prepared, prepare
from lora_cli.engine.target import target_of
from lora_cli.engine.world import join_world
from lora_cli.errors import LoraError
from lora_cli.report.events import Emit, Working, ignore
from lora_cli.runs.folder import RunFolder
from lora_cli.train.loop import Loop
from lora_cli.train.position import Position
from lora_cli.train.run import assemble
from lora_cli.train.trackers import Trackers

STEPS = 4
"""Of which the first is not counted: kernels are loaded, caches filled and the optimizer's state made in it."""


@dataclass(frozen=True)
class Speed:
    """What the probe measured."""

    steps: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    run_seconds: float
    """Of the whole run's steps at this speed; loading, evaluating and saving come on top."""
    tflops: float | None
    """10^12 operations a second; None where the model can't be traced."""


def probe_speed(config: Config, emit: Emit = ignore) -> Speed:
    """Time steps 2 to 4 of the run that `config` describes, on the device at hand.

    Raises:
        UserError: what `train` would raise before its first step.
    """
    world = join_world()
    prepared = prepare(config, world.device, processes=world.size, emit=emit)
    _, learner = assemble(prepared, world, emit)
    tokens = prepared.plan.engine.micro_batch_tokens
    position = Position(micro_batch_tokens=tokens, asked_micro_batch_tokens=tokens, threads=torch.get_num_threads())
    emit(Working("timing a few steps"))
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            prepared.config,
            prepared.plan,
            learner,
            prepared.train,
            None,
            world,
            RunFolder(Path(folder)),
            position,
            ignore,
            Trackers(),
        )
        steps = min(STEPS, prepared.plan.steps.total)
        before, skipped = 0.0, 0
        for step in range(1, steps + 1):
            loop.take_step(step)
            if step == 1 and steps > 1:
                before, skipped = position.train_seconds, position.num_tokens
    seconds, num_tokens = position.train_seconds - before, position.num_tokens - skipped
    per_second = num_tokens / max(seconds, 1e-9)
    per_token = _flops_per_token(prepared, world.device)
    return Speed(
        steps=max(1, steps - 1),
        num_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=per_second,
        run_seconds=prepared.plan.data.num_tokens * prepared.plan.steps.epochs / max(per_second, 1e-9),
        tflops=None if per_token is None else per_token * per_second / 1e12,
    )


def _flops_per_token(prepared: Prepared, device: torch.device) -> float | None:
    """Of a full micro-batch of the longest examples: attention over shorter ones is less."""
    target = target_of(device)
    try:
        return Rehearsals(prepared.architecture, prepared.proof).need(prepared.config, target).flops_per_token
    except LoraError:
        return None
