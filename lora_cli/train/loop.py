"""The loop: optimizer steps, lines of metrics, evaluations, checkpoints, until the plan's last step.

Knows nothing of screens, and nothing of how its learner was made.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_cli.config import Config
from lora_cli.data.examples import Examples
from lora_cli.data.order import step_examples
from lora_cli.data.packing import share
from lora_cli.engine.batch import FlatBatch, flat_batch
from lora_cli.engine.scoring import example_losses
from lora_cli.engine.step import Learner, OutOfMemory, StepResult, train_step
from lora_cli.engine.world import World
from lora_cli.errors import Interrupted, TrainingError
from lora_cli.plan import Plan
from lora_cli.report.events import Emit, Evaluated, Logged, Measured, Resumed, Saved, Stepped, Stopped, Warned, Working
from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import Position, prune_checkpoints, save_checkpoint
from lora_cli.train.memory import peak_memory_bytes
from lora_cli.train.signals import StopSignals
from lora_cli.train.trackers import Trackers

SKIPS_BEFORE_GIVING_UP = 3
STEPS_BEFORE_MEASURED = 5


@dataclass
class Loop:
    """One run of the loop over prepared data, from a position to the last planned step."""

    config: Config
    plan: Plan
    learner: Learner
    train: Examples
    validation: Examples | None
    world: World
    folder: RunFolder
    position: Position
    emit: Emit
    trackers: Trackers
    stopped: str | None = None
    _signals: StopSignals = field(default_factory=StopSignals, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> None:
        """Take the remaining steps.

        Raises:
            TrainingError: out of memory at the smallest size, or too many non-finite steps in a row.
            Interrupted: a signal came; a checkpoint was written.
        """
        position, total = self.position, self.plan.steps.total
        self.stopped = self._lost_patience()
        if position.step:
            self.emit(Resumed(position.step, self.folder.checkpoint(position.step)))
        elif self.validation is not None:
            self.evaluate()  # where the base stands
        with self._signals.listening():
            while position.step < total and self.stopped is None:
                self.take_step(position.step + 1)
                last = position.step == total
                if self._due(self.config.train.logging_steps) or last:
                    self.log()
                if self.validation is not None and (self._due(self._eval_steps()) or last):
                    self.evaluate()
                    self.stopped = self._lost_patience()
                if self.stopped is not None:
                    self.log()  # what there is since the last line
                if self._due(self.config.train.save_steps) or self._minutes_are_over() or last or self.stopped:
                    self.save()
                self._stop_if_asked()
        if self.stopped is not None:
            self.emit(Stopped(position.step, self.stopped))

    def take_step(self, step: int) -> None:
        """One optimizer step, in smaller micro-batches when memory runs out; its figures into the position."""
        indices = step_examples(
            step,
            seed=self.config.train.seed,
            count=len(self.train),
            batch_size=self.config.train.batch_size,
            draw=self.train.draw,
        )
        num_supervised = int(self.train.supervised[indices].sum())
        num_tokens = int(self.train.lengths[indices].sum())
        began = time.perf_counter()
        while True:
            self._seed(step)
            try:
                result = train_step(self.learner, self._batches(indices), num_supervised, self.world)
                break
            except OutOfMemory:
                self._halve(step, int(self.train.lengths[indices].max()))
        self._account(step, result, num_tokens, num_supervised, time.perf_counter() - began)
        if _skipped(result):
            self._skip(step, result, [self.train.places[int(i)] for i in indices])
        else:
            self.position.skipped_in_a_row = 0

    def log(self) -> None:
        """A line of metrics over the steps since the last one."""
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
        self._write(metrics)
        self.emit(Logged(metrics, self.plan.steps.total, self._seconds_left()))

    def evaluate(self) -> None:
        """The validation loss at this step; early stopping and the best checkpoint follow from it."""
        assert self.validation is not None
        position = self.position
        loss = self._validation_loss(self.validation)
        # The base itself, at step 0, is where the run starts from and never its result.
        best = position.step > 0 and (position.best_eval_loss is None or loss < position.best_eval_loss)
        position.eval_losses.append([position.step, loss])
        position.evals_since_best = 0 if best or not position.step else position.evals_since_best + 1
        if best:
            position.best_eval_loss, position.best_step = loss, position.step
        self._write({"step": position.step, "eval_loss": loss})
        self.emit(Evaluated(position.step, loss, best))
        if best and self.config.train.load_best_model_at_end:
            self.save()

    def _validation_loss(self, validation: Examples) -> float:
        while True:
            try:
                losses = example_losses(
                    self.learner.model,
                    self.learner.computation,
                    validation,
                    micro_batch_tokens=self.position.micro_batch_tokens,
                    world=self.world,
                    progress=lambda done, of: self.emit(Working("evaluating", done, of, "rows")),
                )
                return float(losses.sum() / validation.supervised.sum())
            except OutOfMemory:
                self._halve(self.position.step, int(validation.lengths.max()))

    def save(self) -> None:
        """A checkpoint of this step; older ones are pruned once it is complete."""
        if self.world.is_main:
            self.position.metrics_bytes = self.folder.metrics_size()
            path = save_checkpoint(self.folder, self.learner, self.position, self.train.fingerprint)
            keep_best = self.position.best_step if self.config.train.load_best_model_at_end else None
            prune_checkpoints(self.folder, self.config.train.save_total_limit, keep_best)
            self.emit(Saved(self.position.step, path))
        self._saved_at = time.monotonic()
        self.world.wait()

    def _batches(self, indices: NDArray[np.int64]) -> Iterator[FlatBatch]:
        """This process's micro-batches of a step, perhaps none."""
        lengths = [int(self.train.lengths[i]) for i in indices]
        mine = share(lengths, self.world.size)[self.world.rank]
        groups = self.learner.computation.micro_batches([lengths[i] for i in mine], self.position.micro_batch_tokens)
        for group in groups:
            yield flat_batch(self.train, [int(indices[mine[i]]) for i in group], self.world.device)

    def _seed(self, step: int) -> None:
        """Dropout is drawn anew for each step and process, so that a resumed run needs no stored generator."""
        seeds = np.random.SeedSequence((self.config.train.seed, step, self.world.rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _account(self, step: int, result: StepResult, tokens: int, supervised: int, seconds: float) -> None:
        position, total = self.position, self.plan.steps.total
        position.step = step
        position.train_seconds += seconds
        position.window_seconds += seconds
        if not _skipped(result):  # one loss that is not a number would hide all others of its line
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

    def _skip(self, step: int, result: StepResult, places: list[str]) -> None:
        """A non-finite step: said, counted, and after a few in a row the end."""
        self.position.skipped_in_a_row += 1
        self._write({"step": step, "skipped": True})
        what = "gradient" if math.isfinite(result.loss) else "loss"
        named = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        self.emit(Warned(f"step {step:,}: the {what} is not finite; the step was skipped. Its rows: {named}"))
        if self.position.skipped_in_a_row >= SKIPS_BEFORE_GIVING_UP:
            raise TrainingError(
                f"{SKIPS_BEFORE_GIVING_UP} steps in a row gave a {what} that is not finite, the last at step {step:,}",
                remedy=f"Its rows: {named}\nA lower train.learning_rate, or model.dtype: float32, often helps.",
            )

    def _halve(self, step: int, longest: int) -> None:
        """Smaller micro-batches from here on; at one row each there is nothing left to halve."""
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        before = self.position.micro_batch_tokens
        if before <= longest:
            raise TrainingError(
                f"out of memory at step {step:,}, with one row at a time ({longest:,} tokens)",
                remedy=f"Shorter rows (data.max_length below {longest}), train.gradient_checkpointing: true,\n"
                f"model.quantization: {{type: nf4}} or train.optim: adamw_8bit need less.{self._kept()}",
            )
        self.position.micro_batch_tokens = max(before // 2, 1)
        self._write({"step": step, "micro_batch_tokens": self.position.micro_batch_tokens, "out_of_memory": True})
        self.emit(
            Warned(
                f"out of memory at step {step:,}: micro-batches of {self.position.micro_batch_tokens:,} tokens from "
                "here on; the result is the same"
            )
        )

    def _lost_patience(self) -> str | None:
        """Why the run ends early, if it does; a function of the position, so that a resumed run ends as well."""
        patience = self.config.train.early_stopping_patience
        lost = patience is not None and self.position.evals_since_best >= patience
        if not lost or self.position.step >= self.plan.steps.total:
            return None
        return f"no better validation loss in {patience} evaluations"

    def _due(self, every: int | None) -> bool:
        return every is not None and self.position.step % every == 0

    def _eval_steps(self) -> int | None:
        value = self.config.train.eval_steps
        if value is not None and value < 1:
            return math.ceil(value * self.plan.steps.total)  # as transformers rounds it
        return _whole(value)

    def _minutes_are_over(self) -> bool:
        minutes = self.config.train.save_minutes
        over = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return minutes is not None and self.world.any(over)

    def _seconds_left(self) -> float:
        done = self.position.step
        return self.position.train_seconds / max(done, 1) * (self.plan.steps.total - done)

    def _write(self, metrics: Mapping[str, Any]) -> None:
        if self.world.is_main:
            self.folder.append_metrics(metrics)
            self.trackers.log(metrics)

    def _stop_if_asked(self) -> None:
        if not self.world.any(self._signals.received is not None):
            return
        self.save()  # and no line of metrics: the window goes on where the run does
        number = self._signals.received or signal.SIGTERM  # another process's signal, where this one had none
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.position.step:,}; checkpoint written",
            remedy=self._resume_command(),
        )

    def _resume_command(self) -> str:
        return f"Go on with: lora train {shlex.quote(str(self.folder.config_file))} --resume"

    def _kept(self) -> str:
        """What is left of a run that runs out of memory: nothing has moved since its last step, so that is saved."""
        if not self.position.step:
            return ""
        self.save()
        saved = self.folder.checkpoint(self.position.step)
        return f"\nSaved: {saved}\nOnce memory is free: {self._resume_command().removeprefix('Go on with: ')}"


def _skipped(result: StepResult) -> bool:
    """Whether the step was left out for a loss or gradient that is not finite; float16's scaler does that routinely."""
    return not result.applied and not result.scaler_skipped


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
