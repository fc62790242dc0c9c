"""What a command says while it works, as frozen values.

`train` and its neighbours emit these and never print; the console, a test, or a program that uses the library
decides what becomes of them. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_cli.plan import ParameterReport, Plan


@dataclass(frozen=True)
class Working:
    """Something that takes a while has begun: `loading weights`. `total` units of it, where known."""

    what: str
    done: int = 0
    total: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Planned:
    """The plan is made; nothing has been written and no step taken."""

    plan: Plan


@dataclass(frozen=True)
class Warned:
    """Something that the user should know and that does not stop the run."""

    text: str


@dataclass(frozen=True)
class Resumed:
    """The run goes on after this step."""

    step: int
    checkpoint: Path


@dataclass(frozen=True)
class Measured:
    """How long the run will take, once the first steps are measured."""

    seconds: float
    """For all remaining steps, evaluations left out."""


@dataclass(frozen=True)
class Stepped:
    """An optimizer step was taken. Sums and means are of this step alone."""

    step: int
    total: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    seconds_gone: float
    seconds_left: float


@dataclass(frozen=True)
class Logged:
    """A training line was written to metrics.jsonl; `metrics` is that line."""

    metrics: dict[str, Any]
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Evaluated:
    """The validation loss was measured (nats per supervised token)."""

    step: int
    eval_loss: float
    best: bool


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """The run ended before its last step: `early stopping`, `interrupted`."""

    step: int
    why: str


@dataclass(frozen=True)
class Summary:
    """What summary.json holds: the final figures of a run.

    Losses are token-weighted means in nats. `first_loss` and `final_loss` are taken over `loss_span` steps at
    the start and at the end. Evaluation losses are None without validation data.
    """

    steps: int
    num_tokens: int
    num_supervised_tokens: int
    train_seconds: float
    """Without loading, evaluation and saving."""
    tokens_per_second: float
    first_loss: float
    final_loss: float
    loss_span: int
    first_eval_loss: float | None
    final_eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    peak_memory_bytes: int
    output_dir: str
    adapter_dir: str
    adapter_bytes: int
    stopped: str | None
    """Why it ended before the last planned step; None when it did not."""
    parameters: ParameterReport

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "parameters": self.parameters.as_json()}


@dataclass(frozen=True)
class Finished:
    """The run is over and its result is in place."""

    summary: Summary


@dataclass(frozen=True)
class SweepPlanned:
    """The members of a sweep are known; nothing has been written and no step taken."""

    plan: Plan
    """Of the first member; what all share is in it."""
    members: tuple[str, ...]
    grid: dict[str, tuple[Any, ...]]
    """The values of each setting."""
    trainable: tuple[int, ...]
    """Trainable parameters of each member."""
    steps: tuple[int, ...]
    """Optimizer steps of each member."""
    in_turn: bool
    """Whether members take a step one after the other, each as in a run of its own; else in the same rows."""
    output_dir: str
    halving: str | None
    """When the worst members are dropped, in words."""


@dataclass(frozen=True)
class SweepStepped:
    """Every member that was due took a step. Losses are of that step; the best is the lowest."""

    step: int
    total: int
    active: int
    members: int
    best: str
    best_loss: float
    worst_loss: float
    num_tokens: int
    """Of all members."""
    tokens_per_second: float
    peak_memory_bytes: int
    seconds_gone: float
    seconds_left: float
    logged: bool
    """Whether lines of metrics were written at this step."""


@dataclass(frozen=True)
class Dropped:
    """A member's training ended before its last step, and the others go on."""

    member: str
    step: int
    why: str


@dataclass(frozen=True)
class Standing:
    """One line of a leaderboard."""

    name: str
    changes: dict[str, Any]
    """Its values by dotted key."""
    steps: int
    train_loss: float | None
    """The mean over the last steps, as in its summary.json."""
    eval_loss: float | None
    """The validation loss that its adapter has."""
    trainable: int
    stopped: str | None
    """Why it ended before its last planned step."""
    failed: bool
    """Whether it has no result."""
    output_dir: str


@dataclass(frozen=True)
class SweepSummary:
    """What leaderboard.json holds: the members, best first, and the final figures of the sweep."""

    ranked_by: str
    """`eval_loss` or `train_loss`."""
    members: tuple[Standing, ...]
    rungs: tuple[dict[str, Any], ...]
    """Each halving: the step, every member's validation loss there, and who was dropped."""
    num_tokens: int
    train_seconds: float
    """Without loading, evaluation and saving."""
    tokens_per_second: float
    peak_memory_bytes: int
    output_dir: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SweepFinished:
    """The sweep is over and the members' results are in place."""

    summary: SweepSummary


SweepEvent = SweepPlanned | SweepStepped | Dropped | SweepFinished
RunEvent = Planned | Resumed | Measured | Stepped | Logged | Evaluated | Saved | Stopped | Finished
Event = Working | Warned | RunEvent | SweepEvent
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The emitter of a library call that wants silence."""
