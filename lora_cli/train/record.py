"""What a run notes of its steps: sums in its position, lines in metrics.jsonl, events for the screen.

Knows nothing of how a step is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.engine.step import StepResult
from lora_cli.engine.world import World
from lora_cli.plan import Plan
from lora_cli.report.events import Emit, Logged, Measured, Stepped
from lora_cli.runs.folder import RunFolder
from lora_cli.train.memory import peak_memory_bytes
from lora_cli.train.position import Position
from lora_cli.train.trackers import Trackers

STEPS_BEFORE_MEASURED = 5


@dataclass(frozen=True)
class Record:
    """The notes of one run. Every process keeps the sums; the main one writes."""

    plan: Plan
    world: World
    folder: RunFolder
    position: Position
    emit: Emit
    trackers: Trackers

    def step(self, step: int, result: StepResult, tokens: int, supervised: int, seconds: float) -> None:
        """Note a step that was taken; one that was skipped counts in no sum."""
        position, total = self.position, self.plan.steps.total
        position.step = step
        position.train_seconds += seconds
        position.window_seconds += seconds
        if not was_skipped(result):  # one loss that is not a number would hide all others of its line
            position.learning_rate, position.grad_norm = result.learning_rate, result.grad_norm
            position.num_tokens += tokens
            position.num_supervised_tokens += supervised
            position.window_loss += result.loss * supervised
            position.window_tokens += tokens
            position.window_supervised += supervised
            position.note_loss(result.loss * supervised, supervised)
        if step == min(STEPS_BEFORE_MEASURED, total):
            self.emit(Measured(self._seconds_left()))
        self.emit(
            Stepped(
                step=step,
                total=total,
                epoch=step / self.plan.steps.per_epoch,
                loss=result.loss,
                learning_rate=result.learning_rate,
                grad_norm=result.grad_norm,
                num_tokens=tokens,
                num_supervised_tokens=supervised,
                tokens_per_second=tokens / max(seconds, 1e-9),
                peak_memory_bytes=peak_memory_bytes(self.world.device),
                seconds_gone=position.train_seconds,
                seconds_left=self._seconds_left(),
            )
        )

    def line(self) -> None:
        """A line of metrics over the steps since the last one, if there were any."""
        position = self.position
        if not position.window_supervised:
            return
        metrics = {
            "step": position.step,
            "epoch": round(position.step / self.plan.steps.per_epoch, 6),
            "loss": position.window_loss / position.window_supervised,
            "learning_rate": position.learning_rate,
            "grad_norm": position.grad_norm,
            "num_tokens": position.window_tokens,
            "num_supervised_tokens": position.window_supervised,
            "tokens_per_second": position.window_tokens / max(position.window_seconds, 1e-9),
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
        }
        position.window_loss = position.window_seconds = 0.0
        position.window_tokens = position.window_supervised = 0
        self.write(metrics)
        self.emit(Logged(metrics, self.plan.steps.total, self._seconds_left()))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """A line as it is, to metrics.jsonl and the trackers."""
        if self.world.is_main:
            self.folder.append_metrics(metrics)
            self.trackers.log(metrics)

    def _seconds_left(self) -> float:
        done = self.position.step
        return self.position.train_seconds / max(done, 1) * (self.plan.steps.total - done)


def was_skipped(result: StepResult) -> bool:
    """Whether the step was left out for a loss or gradient that is not finite; float16's scaler does that routinely."""
    return not result.applied and not result.scaler_skipped
