"""What can go wrong with a step, and what the run makes of it: said, written down, and at some point the end.

Numbers that aren't finite, memory that runs out, steps from which nothing is learned. Whatever ends the run here has
moved no parameter since the last good step, so that is saved first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_cli.engine.step import StepResult
from lora_cli.engine.world import World
from lora_cli.errors import TrainingError
from lora_cli.report.events import Emit, Warned
from lora_cli.train.position import Position
from lora_cli.train.record import Record, was_skipped

SKIPS_BEFORE_GIVING_UP = 3
STEPS_BEFORE_LEARNING_SHOWS = 3
_NAMED = 8
_BORN_ZERO = (".lora_B.", ".lora_embedding_A.")
"""The factor of PEFT's pairs that starts at zero, and that stays there exactly as long as it has no gradient."""


@dataclass(frozen=True)
class Setbacks:
    """The setbacks of one run."""

    parameters: Mapping[str, nn.Parameter]
    world: World
    position: Position
    record: Record
    emit: Emit
    kept: Callable[[], str]
    """Saves the state after the last good step, and says so in lines of a remedy."""

    def after_step(self, step: int, result: StepResult, places: list[str]) -> None:
        """Look at a step's figures.

        Raises:
            TrainingError: a few steps in a row were not finite, or nothing is being learned.
        """
        if was_skipped(result):
            self._skip(step, result, places)
            return
        self.position.skipped_in_a_row = 0
        if result.applied and result.learning_rate > 0:
            self.position.steps_learning += 1
            if self.position.steps_learning == STEPS_BEFORE_LEARNING_SHOWS:
                self._look_for_learning(result)

    def _skip(self, step: int, result: StepResult, places: list[str]) -> None:
        """A non-finite step: said, counted, and after a few in a row the end."""
        self.position.skipped_in_a_row += 1
        self.record.write({"step": step, "skipped": True})
        what = "gradient" if math.isfinite(result.loss) else "loss"
        named = ", ".join(places[:_NAMED]) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
        self.emit(Warned(f"step {step:,}: the {what} is not finite; the step was skipped. Its rows: {named}"))
        if self.position.skipped_in_a_row >= SKIPS_BEFORE_GIVING_UP:
            raise TrainingError(
                f"{SKIPS_BEFORE_GIVING_UP} steps in a row gave a {what} that is not finite, the last at step {step:,}",
                remedy=f"Its rows: {named}\nA lower train.learning_rate, or model.dtype: float32, often helps."
                f"{self.kept()}",
            )

    def _look_for_learning(self, result: StepResult) -> None:
        """After a few steps every target has moved, or it never will."""
        born_zero = _born_zero(self.parameters)
        still = [name for name, parameter in born_zero.items() if not torch.count_nonzero(parameter)]
        if result.grad_norm == 0.0 or (still and len(still) == len(born_zero)):
            why = (
                "every gradient is zero"
                if result.grad_norm == 0.0
                else "every adapter is still what it started as, so its product is zero"
            )
            raise TrainingError(
                f"nothing is being learned: after {STEPS_BEFORE_LEARNING_SHOWS} steps with a learning rate above 0 "
                f"{why}",
                remedy="The loss doesn't depend on adapter.target_modules, the base's weights are broken (zeros where\n"
                "there should be none), or train.learning_rate is too small for float32.",
            )
        if still:
            modules = [name.split(".lora_")[0].removeprefix("base_model.model.") for name in still]
            more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
            self.emit(
                Warned(
                    f"{len(still):,} of {len(born_zero):,} targets had no gradient in the first steps and have learned "
                    f"nothing: {', '.join(modules[:3])}{more}"
                )
            )

    def halve(self, step: int, longest: int) -> None:
        """Smaller micro-batches from here on; at one row each there is nothing left to halve.

        Raises:
            TrainingError: memory ran out with one row at a time.
        """
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        before = self.position.micro_batch_tokens
        if before <= longest:
            raise TrainingError(
                f"out of memory at step {step:,}, with one row at a time ({longest:,} tokens)",
                remedy=f"Shorter rows (data.max_length below {longest}), train.activation_offloading: true,\n"
                f"model.quantization: {{type: nf4}} or train.optim: adamw_8bit need less.{self.kept()}",
            )
        self.position.micro_batch_tokens = max(before // 2, 1)
        self.record.write({"step": step, "micro_batch_tokens": self.position.micro_batch_tokens, "out_of_memory": True})
        self.emit(
            Warned(
                f"out of memory at step {step:,}: micro-batches of {self.position.micro_batch_tokens:,} tokens from "
                "here on; the result is the same"
            )
        )


def has_not_moved(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether every adapter's product is still zero, so that the model is its base."""
    born_zero = _born_zero(parameters)
    return bool(born_zero) and not any(torch.count_nonzero(parameter) for parameter in born_zero.values())


def _born_zero(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in parameters.items() if any(part in name for part in _BORN_ZERO)}
