"""Where a run stands: everything of the loop that outlives a step, and therefore all that a checkpoint says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

LOSS_SPAN = 50
"""Steps at the start and at the end of a run whose mean loss its summary gives."""


@dataclass
class Position:
    """The state of the loop at a step's boundary. Sums are since the last line written."""

    step: int = 0
    micro_batch_tokens: int = 0
    asked_micro_batch_tokens: int = 0
    """What the config said, before any halving: another value on resuming is another wish."""
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    """Of the last step that counted, as the learning rate."""
    train_seconds: float = 0.0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    window_loss: float = 0.0
    """Sum of token losses, nats."""
    window_tokens: int = 0
    window_supervised: int = 0
    window_seconds: float = 0.0
    steps_counted: int = 0
    steps_learning: int = 0
    """Steps that were applied with a learning rate above 0."""
    first_losses: list[list[float]] = field(default_factory=list)
    last_losses: list[list[float]] = field(default_factory=list)
    """[loss sum, supervised tokens] of the first and last `LOSS_SPAN` steps, for the summary's means."""
    eval_losses: list[list[float]] = field(default_factory=list)
    """[step, loss] of each evaluation."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    skipped_in_a_row: int = 0
    resumed_after: list[int] = field(default_factory=list)
    """Steps after which the run was stopped, and gone on with."""
    metrics_bytes: int = 0
    """Where metrics.jsonl ended."""
    threads: int = 0
    processes: int = 1

    @property
    def is_evaluated(self) -> bool:
        """Whether the validation loss at this step is known."""
        return bool(self.eval_losses) and self.eval_losses[-1][0] == self.step

    def note_loss(self, loss_sum: float, supervised: int) -> None:
        """Remember a step's loss as long as it may be among the first or the last."""
        self.steps_counted += 1
        if len(self.first_losses) < LOSS_SPAN:
            self.first_losses.append([loss_sum, supervised])
        self.last_losses = [*self.last_losses, [loss_sum, supervised]][-LOSS_SPAN:]
