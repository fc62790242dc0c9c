"""The loop: optimizer steps, lines of metrics, evaluations, checkpoints, until the plan's last step.

Knows nothing of screens, and nothing of how its learner was made. What it notes is in `record`, what can go wrong with
a step in `setbacks`.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lora_cli.config import Config
from lora_cli.data.examples import Examples
from lora_cli.data.order import step_examples
from lora_cli.data.packing import share
from lora_cli.engine.batch import FlatBatch, flat_batch
from lora_cli.engine.scoring import example_losses
from lora_cli.engine.step import Abandoned, Learner, OutOfMemory, StepResult, train_step
from lora_cli.engine.world import World
from lora_cli.errors import Interrupted
from lora_cli.plan import Plan
from lora_cli.report.events import Emit, Evaluated, Resumed, Saved, Stopped, Working
from lora_cli.runs.folder import RunFolder
from lora_cli.train.checkpoint import prune_checkpoints, save_checkpoint
from lora_cli.train.position import Position
from lora_cli.train.record import Record
from lora_cli.train.setbacks import Setbacks
from lora_cli.train.signals import StopSignals
from lora_cli.train.trackers import Trackers


@dataclass(frozen=True)
class StepRows:
    """What a step sees."""

    step: int
    indices: NDArray[np.int64]
    num_tokens: int
    num_supervised: int


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
    heed: Callable[[], None] | None = None
    """Called between two micro-batches in place of the loop's own look at signals; may raise `Abandoned`."""
    _signals: StopSignals = field(default_factory=StopSignals, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self._record = Record(self.plan, self.world, self.folder, self.position, self.emit, self.trackers)
        self._setbacks = Setbacks(
            self.learner.parameters, self.world, self.position, self._record, self.emit, self._kept
        )

    def run(self) -> None:
        """Take the remaining steps.

        Raises:
            TrainingError: out of memory at the smallest size, non-finite steps in a row, or nothing is being learned.
            Interrupted: a signal came; a checkpoint was written.
        """
        if self.position.step:
            self.emit(Resumed(self.position.step, self.folder.checkpoint(self.position.step)))
        with self._signals.listening():
            try:
                self._take_steps()
            except Abandoned:
                self._stop()
        if self.stopped is not None:
            self.emit(Stopped(self.position.step, self.stopped))

    def _take_steps(self) -> None:
        position = self.position
        self.stopped = self.lost_patience()
        self._evaluate_if_due()  # where the base stands, or the evaluation that a signal cut short
        while not self.is_over:
            self.take_step(position.step + 1)
            if self.is_due(self.config.train.logging_steps) or self.is_over:
                self.write_line()
            self._evaluate_if_due()
            if self.stopped is not None:
                self.write_line()  # what there is since the last one
            stop, save = self._asked()
            if self.is_due(self.config.train.save_steps) or save or self.is_over:
                self.save()
            if stop:
                raise Abandoned

    def take_step(self, step: int) -> StepResult:
        """One optimizer step, in smaller micro-batches when memory runs out; its figures into the position.

        Raises:
            TrainingError: as `took`, or out of memory with one row at a time.
        """
        rows = self.rows(step)
        began = time.perf_counter()
        result = self._applied(rows)
        self.took(rows, result, time.perf_counter() - began)
        return result

    def rows(self, step: int) -> StepRows:
        """Which rows a step takes."""
        train = self.config.train
        indices = step_examples(
            step, seed=train.seed, count=len(self.train), batch_size=train.batch_size, draw=self.train.draw
        )
        num_tokens, num_supervised = self.train.lengths[indices].sum(), self.train.supervised[indices].sum()
        return StepRows(step, indices, int(num_tokens), int(num_supervised))

    def took(self, rows: StepRows, result: StepResult, seconds: float) -> None:
        """Note a step that was taken.

        Raises:
            TrainingError: a few in a row were not finite, or nothing is being learned.
        """
        self._record.step(rows.step, result, rows.num_tokens, rows.num_supervised, seconds)
        self._setbacks.after_step(rows.step, result, [self.train.places[int(i)] for i in rows.indices])

    def _applied(self, rows: StepRows) -> StepResult:
        while True:
            self._seed(rows.step)
            try:
                return train_step(self.learner, self._batches(rows.indices), rows.num_supervised, self.world)
            except OutOfMemory:
                self._setbacks.halve(rows.step, int(self.train.lengths[rows.indices].max()))

    def evaluate(self) -> None:
        """The validation loss at this step; early stopping and the best checkpoint follow from it."""
        self.note_evaluation(self.validation_loss())

    def note_evaluation(self, loss: float) -> None:
        """Take in the validation loss at this step."""
        position = self.position
        # The base itself, at step 0, is where the run starts from and never its result.
        best = position.step > 0 and (position.best_eval_loss is None or loss < position.best_eval_loss)
        position.eval_losses.append([position.step, loss])
        position.evals_since_best = 0 if best or not position.step else position.evals_since_best + 1
        if best:
            position.best_eval_loss, position.best_step = loss, position.step
        self._record.write({"step": position.step, "eval_loss": loss})
        self.emit(Evaluated(position.step, loss, best))
        if best and self.config.train.load_best_model_at_end:
            self.save()

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the validation loss is wanted at this step, and not yet known."""
        step = self.position.step
        due = step in (0, self.plan.steps.total) or self.is_due(self._eval_steps())
        return self.validation is not None and due and not self.position.is_evaluated

    def _evaluate_if_due(self) -> None:
        if self.evaluation_is_due:
            self.evaluate()
            self.stopped = self.lost_patience()

    def validation_loss(self) -> float:
        """Nats per supervised token of the validation rows, in smaller micro-batches when memory runs out."""
        assert self.validation is not None
        validation = self.validation

        def progress(done: int, of: int) -> None:
            self.emit(Working("evaluating", done, of, "rows"))
            self._heed_signals()

        while True:
            try:
                losses = example_losses(
                    self.learner.model,
                    self.learner.computation,
                    validation,
                    micro_batch_tokens=self.position.micro_batch_tokens,
                    world=self.world,
                    progress=progress,
                )
                return float(losses.sum() / validation.supervised.sum())
            except OutOfMemory:
                self._setbacks.halve(self.position.step, int(validation.lengths.max()))

    def save(self) -> None:
        """A checkpoint of this step; older ones are pruned once it is complete."""
        if self.world.is_main:
            self._write_checkpoint()
        self._saved_at = time.monotonic()
        self.world.wait()

    def _write_checkpoint(self) -> None:
        """By the main process alone. In the middle of a step, too: nothing has moved since the last one."""
        if self.folder.checkpoint(self.position.step).exists():
            return
        self.position.metrics_bytes = self.folder.metrics_size()
        path = save_checkpoint(self.folder, self.learner, self.position, self.train.fingerprint)
        keep_best = self.position.best_step if self.config.train.load_best_model_at_end else None
        prune_checkpoints(self.folder, self.config.train.save_total_limit, keep_best)
        self.emit(Saved(self.position.step, path))

    def _batches(self, indices: NDArray[np.int64]) -> Iterator[FlatBatch]:
        """This process's micro-batches of a step, perhaps none."""
        lengths = [int(self.train.lengths[i]) for i in indices]
        mine = share(lengths, self.world.size)[self.world.rank]
        groups = self.learner.computation.micro_batches([lengths[i] for i in mine], self.position.micro_batch_tokens)
        for group in groups:
            self._heed_signals()
            yield flat_batch(self.train, [int(indices[mine[i]]) for i in group], self.world.device)

    def _seed(self, step: int) -> None:
        """Dropout is drawn anew for each step and process, so that a resumed run needs no stored generator."""
        seeds = np.random.SeedSequence((self.config.train.seed, step, self.world.rank))
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def lost_patience(self) -> str | None:
        """Why the run ends early, if it does; a function of the position, so that a resumed run ends as well."""
        patience = self.config.train.early_stopping_patience
        lost = patience is not None and self.position.evals_since_best >= patience
        if not lost or self.position.step >= self.plan.steps.total:
            return None
        return f"no better validation loss in {patience} evaluations"

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take."""
        return self.stopped is not None or self.position.step >= self.plan.steps.total

    def write_line(self) -> None:
        """A line of metrics over the steps since the last one, if there were any."""
        self._record.line()

    def is_due(self, every: int | None) -> bool:
        """Whether something that happens in every so many steps is due at this one."""
        return every is not None and self.position.step % every == 0

    def _eval_steps(self) -> int | None:
        value = self.config.train.eval_steps
        if value is not None and value < 1:
            return math.ceil(value * self.plan.steps.total)  # as transformers rounds it
        return None if value is None else int(value)

    # Signals

    def _heed_signals(self) -> None:
        """Between two micro-batches: write a checkpoint, and stop here or go on.

        Raises:
            Abandoned: to be agreed upon by all processes where they next meet.
        """
        if self.heed is not None:
            self.heed()
            return
        stop = self._signals.received is not None
        if self.world.is_main and (stop or self._signals.save_asked()):
            self._write_checkpoint()
        if stop:
            raise Abandoned

    def _asked(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether any was asked for a checkpoint or finds one overdue."""
        minutes = self.config.train.save_minutes
        overdue = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        wishes = [float(self._signals.received is not None), float(self._signals.save_asked() or overdue)]
        stop, save = self.world.sum(wishes)
        return stop > 0, save > 0

    def _stop(self) -> None:
        """End the run after a signal to any of its processes, with a checkpoint of the last step that was taken."""
        self.save()  # and no line of metrics: the window goes on where the run does
        by_hand = self.world.any(self._signals.received == signal.SIGINT)
        number = signal.SIGINT if by_hand else signal.SIGTERM
        when = f"after step {self.position.step:,}" if self.position.step else "before the first step was taken"
        raise Interrupted(
            number,
            f"stopped by {number.name} {when}; checkpoint written",
            remedy=f"Go on with: {resume_command(self.folder)}",
        )

    def _kept(self) -> str:
        """What is left of a run that can't go on: nothing has moved since its last good step, so that is saved."""
        if not self.position.step:
            return ""
        self.save()
        return f"\nSaved: {self.folder.checkpoint(self.position.step)}\nTo go on: {resume_command(self.folder)}"


def resume_command(folder: RunFolder) -> str:
    """What to type to go on with the run in a folder."""
    return f"lora train {shlex.quote(str(folder.config_file))} --resume"
